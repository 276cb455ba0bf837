"""`turboserve models pull`: a repository's files from the Hugging Face hub into a folder, checked."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from turboserve.cli.options import console
from turboserve.errors import CheckpointError, ConfigError

# What a model needs: weights, configs, tokenizers, and what its owners say of it.
WANTED_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".pt", ".pth", ".md")
WANTED_NAMES = ("LICENSE", "LICENCE", "NOTICE")
_NON_COMMERCIAL = ("nc", "noncommercial", "non-commercial")


def pull_repository(repository: str, output: Path | None, include: tuple[str, ...], list_only: bool) -> dict[str, Any]:
    """Fetch what is wanted and not there yet; every file is then held against the hub's hash.

    A download that was cut off goes on where it stopped. CheckpointError when the hub cannot be reached, the repository
    is not there, or a file's bytes are not those that the hub names.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise ConfigError(f"repository {repository!r}", expected="OWNER/NAME or OWNER/NAME@REVISION")
    say = console()
    try:
        info = HfApi().model_info(name, revision=revision or None, files_metadata=True)
    except Exception as error:  # the HTTP library's errors have no base that the hub's own share
        raise _unreachable(name, error) from None
    files = [one for one in info.siblings or () if _wanted(one.rfilename, include)]
    if not files:
        raise CheckpointError(
            f"{name} has no file to fetch", expected=f"files that match {', '.join(include) or 'weights'}"
        )
    licence = str(info.card_data.get("license") or "not stated") if info.card_data else "not stated"
    total = sum(one.size or 0 for one in files)
    say.print(f"{name} at {info.sha}: {len(files)} files, {total / 1e9:.2f} GB, licence {licence}", markup=False)
    if set(licence.lower().replace("_", "-").split("-")) & set(_NON_COMMERCIAL):
        say.print("this licence does not allow commercial use", style="yellow")
    folder = output or Path(name.split("/")[1])
    listed = [{"file": one.rfilename, "bytes": one.size or 0} for one in files]
    result = {"repository": name, "revision": info.sha, "licence": licence, "output": str(folder), "files": listed}
    if list_only:
        for entry in listed:
            say.print(f"  {entry['bytes']:>14,} {entry['file']}", markup=False)
        return result
    for one in files:
        try:
            hf_hub_download(name, one.rfilename, revision=info.sha, local_dir=folder)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise _unreachable(f"{name}/{one.rfilename}", error) from None
        _check(folder / one.rfilename, one)
    say.print(f"all {len(files)} files hold the bytes that the hub names", markup=False)
    return result


def _wanted(file: str, include: tuple[str, ...]) -> bool:
    path = Path(file)
    if path.is_absolute() or ".." in path.parts:
        return False
    if include:
        return any(fnmatch(file, pattern) for pattern in include)
    return path.suffix in WANTED_SUFFIXES or path.name in WANTED_NAMES


def _check(path: Path, wanted: Any) -> None:
    """Large files have a SHA-256, small ones git's SHA-1 of a blob."""
    with path.open("rb") as file:
        if wanted.lfs is not None:
            found, expected = hashlib.file_digest(file, "sha256").hexdigest(), wanted.lfs.sha256
        elif wanted.blob_id:
            blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
            blob.update(file.read())
            found, expected = blob.hexdigest(), wanted.blob_id
        else:
            return
    if found != expected:
        path.unlink()
        raise CheckpointError(
            f"{path} was not what the hub names and is deleted: {found}", expected=expected, hint="pull again"
        )


def _unreachable(what: str, error: Exception) -> CheckpointError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if status in (401, 403):
        hint = "accept its terms on the hub, then set HF_TOKEN"
    elif status == 404:
        hint = "check its name and revision"
    else:
        hint = "check the network; run the same command again and it goes on where it stopped"
    return CheckpointError(f"cannot fetch {what}: {said}", hint=hint)
