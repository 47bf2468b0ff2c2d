"""What `quantkit auto` made, as a table on a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit.report.allocation_record import AllocationRecord


def render_allocation(made: AllocationRecord, console: Console) -> None:
    """The choice, its size, and the KL that was predicted and measured."""
    table = Table("format", "linears", "weights")
    for share in made.shares:
        table.add_row(escape(share.candidate), f"{share.linears}", f"{share.share:.1%}")
    console.print(table)
    lines = [
        f"{made.bits_per_weight:.4g} bits per weight of the linears, {made.nbytes:,} bytes of .safetensors files "
        f"(at most {made.max_size})",
        f"KL predicted {made.predicted_kl:.5f}, measured {made.measured_kl:.5f} nats per token on "
        f"{made.measured_tokens:,} tokens it was not calibrated on: {made.ratio:.2f} times the prediction",
        f"recipe: {made.output}/recipe.yaml; harms: {made.output}/quantkit-auto.json",
    ]
    for line in [*lines, *(f"warning: {warning}" for warning in made.warnings)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
