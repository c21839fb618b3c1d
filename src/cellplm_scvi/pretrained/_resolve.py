"""From a path or a name on the Hugging Face hub to the files of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, Literal

from ._errors import PretrainedFileError, listed
from ._own import CONFIG_FILE, WEIGHTS_FILE
from ._published import CHECKPOINT_SUFFIX, CONFIG_SUFFIX

#: in a folder that ``save`` wrote
SAVED_FILE = "model.pt"
#: owner/name, and optionally the prefix of a published model inside the repository
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)((?:/[\w.-]+)*)")


@dataclass(frozen=True)
class PretrainedFiles:
    """Configuration and weights of a model.

    Parameters
    ----------
    format
        ``"published"`` (``PREFIX.config.json`` and ``PREFIX.best.ckpt``) or ``"cellplm-scvi"`` (a folder that
        ``save_pretrained`` wrote).
    config, weights
        The two files.
    source
        What to call it in messages.
    """

    format: Literal["published", "cellplm-scvi"]
    config: Path
    weights: Path
    source: str


def resolve(
    path_or_name: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> PretrainedFiles:
    """Find the files of a pre-trained model.

    Parameters
    ----------
    path_or_name
        A folder that ``save_pretrained`` wrote; the common prefix (with its folder) of a published model's two files, either
        of these files, or a folder that holds one such pair; or ``owner/name`` (or ``owner/name/prefix``) on the hub.
    revision, cache_dir
        Of the hub.

    Raises
    ------
    FileNotFoundError
        If it is neither; the message says what was looked for.
    """
    name = str(path_or_name)
    found = _local(Path(path_or_name).expanduser(), name) if name else None
    if found is not None:
        return found
    path = Path(path_or_name).expanduser()
    if name and isfile(path / SAVED_FILE):
        raise FileNotFoundError(f'"{name}" was written by save, which pickles: open it with load, if you trust it.')
    # a name whose folder is here is meant as a path, and not asked of the hub
    here = bool(name) and (isdir(path) or isfile(path) or (len(path.parts) > 1 and isdir(path.parent)))
    match = None if isinstance(path_or_name, Path) or here else _HUB_NAME.fullmatch(name)
    if match is None:
        raise FileNotFoundError(
            f'No model at "{name}". It may be a folder with {CONFIG_FILE} and {WEIGHTS_FILE} (as save_pretrained writes it), '
            f'"PREFIX" with the files PREFIX{CONFIG_SUFFIX} and PREFIX{CHECKPOINT_SUFFIX} (as published), or "owner/name" on '
            "the Hugging Face hub."
        )
    folder = _download(f"{match[1]}/{match[2]}", match[3].strip("/"), revision, cache_dir)
    found = _local(folder / match[3].strip("/"), name)
    if found is None:
        raise FileNotFoundError(
            f'"{match[1]}/{match[2]}" on the hub holds neither {CONFIG_FILE} and {WEIGHTS_FILE} nor a pair of files '
            f"PREFIX{CONFIG_SUFFIX} and PREFIX{CHECKPOINT_SUFFIX}."
        )
    return found


def _local(path: Path, source: str) -> PretrainedFiles | None:
    """The files at a path, or ``None`` if there is nothing there."""
    # of os.path, since the methods of Path raise on names that cannot be, such as too long ones
    for suffix in (CONFIG_SUFFIX, CHECKPOINT_SUFFIX):
        if path.name.endswith(suffix) and isfile(path):
            return _local(path.with_name(path.name.removesuffix(suffix)), source)
    if path.name in (CONFIG_FILE, WEIGHTS_FILE) and isfile(path):
        return _pair("cellplm-scvi", path.with_name(CONFIG_FILE), path.with_name(WEIGHTS_FILE), source)
    if isdir(path):
        if isfile(path / CONFIG_FILE) or isfile(path / WEIGHTS_FILE):
            return _pair("cellplm-scvi", path / CONFIG_FILE, path / WEIGHTS_FILE, source)
        prefixes = sorted(p.name.removesuffix(CONFIG_SUFFIX) for p in path.glob(f"*{CONFIG_SUFFIX}"))
        if len(prefixes) > 1:
            raise PretrainedFileError(
                f'"{source}" holds {len(prefixes):,} models ({listed(prefixes)}): name one, such as '
                f'"{source.rstrip("/")}/{prefixes[0]}".'
            )
        if prefixes:
            return _local(path / prefixes[0], source)
    if not path.name:
        return None
    config, weights = (path.with_name(path.name + suffix) for suffix in (CONFIG_SUFFIX, CHECKPOINT_SUFFIX))
    if isfile(config) or isfile(weights):
        return _pair("published", config, weights, source)
    return None


def _pair(kind: Literal["published", "cellplm-scvi"], config: Path, weights: Path, source: str) -> PretrainedFiles:
    for here, absent in ((config, weights), (weights, config)):
        if not isfile(absent):
            raise FileNotFoundError(f'"{source}" has {here.name}, but not {absent.name}, which belongs to it.')
    return PretrainedFiles(kind, config, weights, source)


def _download(repository: str, prefix: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """Folder of the repository in the local cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        raise ImportError(
            f'There is no folder or file "{repository}", and names on the hub need the package huggingface_hub: '
            'pip install "cellplm-scvi[hub]".'
        ) from None
    patterns = (
        [CONFIG_FILE, WEIGHTS_FILE] if not prefix else [f"{prefix}{CONFIG_SUFFIX}", f"{prefix}{CHECKPOINT_SUFFIX}"]
    )
    if not prefix:
        patterns += [f"*{CONFIG_SUFFIX}", f"*{CHECKPOINT_SUFFIX}"]
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "allow_patterns": patterns}
    try:
        return Path(snapshot_download(repository, **options))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        reason = "offline mode is on" if isinstance(error, OfflineModeIsEnabled) else "the hub cannot be reached"
        raise ConnectionError(
            f'"{repository}" is not in the local cache, and {reason}. On a machine with a network, download the files '
            f"{' and '.join(patterns[:2])} of that repository, copy them here into one folder, and pass the path of that "
            "folder instead of the name."
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f'There is no folder or file "{repository}", and the hub does not give a repository of that name '
            f"{f'at revision {revision} ' if revision else ''}({type(error).__name__})."
        ) from error
