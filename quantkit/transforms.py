def apply_transforms(*a, **k):
    raise NotImplementedError
