"""quantkit push: a verified folder onto the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import Json, show_result


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Model folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="USER/NAME on the Hub, made where it is absent.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository that you alone see.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a folder to the Hub, if at least one engine would load it (see `quantkit verify`).

    Example: quantkit push llama-w4 me/llama-3.2-1b-w4a16 --private
    """
    from quantkit.checkpoint.early_checks import check_verifiable
    from quantkit.checkpoint.hub_upload import upload
    from quantkit.errors import UserError
    from quantkit.paths import user_path

    place = user_path(folder)
    if place.is_file():
        raise UserError(f"{folder}: is a file, and folders are uploaded\nhint: give the folder it lies in")
    check_verifiable(place)
    from quantkit.verification import verify_folder

    verdict = verify_folder(place, checksums=True)
    if verdict.verdict == "refused" or any(finding.rule == "checksum" for finding in verdict.findings):
        first = next((finding for finding in verdict.findings if finding.level == "error"), None)
        why = "every engine refuses it" if first is None else f"{first.where}: {first.message}"
        raise UserError(
            f"{folder}: not uploaded: {why}\nhint: `quantkit verify {folder} --checksums` says what is wrong"
        )
    address = upload(place, repository, private=private)
    show_result({"address": address, "private": private}, lambda done, console: console.print(done["address"]), as_json)
