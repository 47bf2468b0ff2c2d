"""How codes are chosen: pure functions of tensors, no modules, no files."""
