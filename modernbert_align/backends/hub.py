"""Fetches a model from the Hugging Face hub, or finds it in the hub's cache.

What is fetched follows from the repository's list of files: config.json, the carried files, and the weights in one
format. Where the hub cannot be asked, a complete snapshot in the cache is as good.

Source: huggingface_hub 0.36 and 1.33: `HfApi.model_info`, `snapshot_download`, `errors.py`, and its cache, where
`refs/<revision>` holds a commit and `snapshots/<commit>/` the files.
"""

import errno
import glob
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from modernbert_align.core.checkpoint import PADDLE_WEIGHTS, TORCH_WEIGHTS, WEIGHTS
from modernbert_align.core.json_input import read_json
from modernbert_align.errors import AlignError, CheckpointError, ConfigError, MissingPackageError, UsageError

CONFIG = "config.json"
_INDEX_SUFFIX = ".index.json"
# Best first, in the order in which `open_checkpoint` looks for them; only the first one that is there is fetched.
FORMATS = tuple(f"{file}{end}" for file in (WEIGHTS, TORCH_WEIGHTS, PADDLE_WEIGHTS) for end in ("", _INDEX_SUFFIX))
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".pdparams", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt"}

_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?(?<!\.git)", re.ASCII)
_REVISION = re.compile(r"(?!-)(?!.*\.\.)(?!\.)[\w.+=#@-]+(?:/(?!\.)[\w.+=#@-]+)*")


@dataclass(frozen=True, kw_only=True)
class HubId:
    """A repository on the hub and what is wanted of it.

    Attributes:
        repository: `owner/name`.
        revision: Branch, tag or commit; None for the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def name(self) -> str:
        """The repository's name as part of a file name, without the revision."""
        return self.repository.replace("/", "--")

    @property
    def download_command(self) -> str:
        """What puts this into the cache, for hints."""
        revision = "" if self.revision is None else f" --revision {shlex.quote(self.revision)}"
        return f"hf download {self.repository}{revision}"


class _UnreachableError(UsageError):
    """The hub could not be asked, so the cache may answer."""


def parse_hub_id(model: str) -> HubId | None:
    """Read `owner/name` or `owner/name@revision`.

    Returns:
        The id, or None if `model` does not have the form of one.

    Raises:
        UsageError: It has the form, but no repository or revision can be called that.
    """
    repository, at, revision = model.partition("@")
    parts = repository.split("/")
    if len(parts) != 2 or not all(parts) or repository.startswith(("~", ".")):
        return None
    if not all(_NAME.fullmatch(part) for part in parts) or len(repository) > 96:
        raise UsageError(
            f"`{model}` is neither a directory nor a hub id",
            hint="hub ids look like `owner/name` or `owner/name@revision`",
        )
    if at and not _REVISION.fullmatch(revision):
        raise UsageError(
            f"`{revision}` in `{model}` cannot be a branch, tag or commit"
            if revision
            else f"`{model}` ends before its revision",
            hint=f"write `{repository}@` and a branch, tag or commit, or `{repository}` alone for the main branch",
        )
    return HubId(repository=repository, revision=revision or None)


def fetch_snapshot(hub_id: HubId, carried_files: Sequence[str], notify: Callable[[str], None]) -> Path:
    """Get the folder of a model, downloading what the cache lacks.

    Args:
        carried_files: Names wanted beside config.json and the weights, where the repository has them.
        notify: Told, in one line, what happens now.

    Returns:
        The snapshot in the hub's cache; its name is the commit.

    Raises:
        UsageError: No such repository or revision, no access, the hub cannot be reached and the cache has nothing, or
            the environment's settings for the hub are wrong.
        CheckpointError: The snapshot is or would be incomplete, or the cache cannot be written.
        ConfigError: The repository has no config.json.
        MissingPackageError: huggingface_hub is not installed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise MissingPackageError(
            f"hub ids need huggingface_hub: {error}", hint="pip install huggingface_hub"
        ) from None
    except ValueError as error:  # it reads its settings when it is imported
        raise UsageError(
            f"huggingface_hub cannot use its settings: {error}", hint="check HF_ENDPOINT and the other HF_ variables"
        ) from None
    if constants.HF_HUB_OFFLINE:
        return _from_cache(hub_id, _explain(errors.OfflineModeIsEnabled(), hub_id), notify)
    notify(f"looking up {hub_id} on the Hugging Face hub")
    try:
        info = huggingface_hub.HfApi().model_info(
            hub_id.repository, revision=hub_id.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except errors.RevisionNotFoundError as error:
        raise _explain(error, hub_id) from None
    except _failures() as error:
        return _from_cache(hub_id, _explain(error, hub_id), notify)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    weights = choose_weights(hub_id.repository, sizes)
    _hide_bars_off_terminal()
    wanted = [CONFIG, *(name for name in carried_files if name in sizes), weights]
    try:
        if weights.endswith(_INDEX_SUFFIX):
            index = huggingface_hub.hf_hub_download(hub_id.repository, weights, revision=info.sha)
            wanted += _listed_shards(hub_id.repository, Path(index), sizes)
        snapshot = _repository_folder(hub_id) / "snapshots" / info.sha
        absent = [name for name in wanted if not (snapshot / name).is_file()]
        if not absent and _cached_folder(hub_id) == snapshot:
            return snapshot
        if absent:
            known = [sizes[name] for name in absent]
            total = "" if None in known else f", {sum(known):,} bytes,"
            count = f"{len(absent)} file{'s' if len(absent) > 1 else ''}"
            notify(f"downloading {count}{total} of {hub_id} into {constants.HF_HUB_CACHE}")
        # The revision and not the commit: that way the cache also learns which commit the revision is.
        folder = Path(
            huggingface_hub.snapshot_download(
                hub_id.repository, revision=hub_id.revision, allow_patterns=[glob.escape(name) for name in wanted]
            )
        )
    except _failures() as error:
        explained = _explain(error, hub_id)
        if not isinstance(explained, _UnreachableError):
            raise explained from None
        raise UsageError(
            f"`{hub_id}` could not be downloaded: {explained.message}",
            hint="run the command again; files that are complete are not fetched twice",
        ) from None
    lost = _missing_files(folder)
    if lost:
        raise _incomplete(folder, lost, "after the download", hint=f"run `{hub_id.download_command}`")
    return folder


def choose_weights(repository: str, files: Collection[str]) -> str:
    """The file that holds the weights, or their index, in the best format that a repository has.

    Args:
        files: Names of the repository's files.

    Raises:
        ConfigError: There is no config.json among them.
        CheckpointError: There are no weights in a format that can be used.
    """
    if CONFIG not in files:
        raise ConfigError(f"the repository `{repository}` has no {CONFIG}", hint="give the id of a model")
    for name in FORMATS:
        if name in files:
            return name
    others = sorted(name for name in files if Path(name).suffix in _WEIGHT_SUFFIXES)
    raise CheckpointError(
        f"the repository `{repository}` has no weights under a name that is read here: "
        f"{', '.join(name for name in FORMATS if not name.endswith(_INDEX_SUFFIX))}, or an index of shards",
        hint=f"it has {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}; save the model as safetensors"
        if others
        else "give a repository that holds a whole model",
    )


def shard_names(index: Path) -> list[str]:
    """Names of the files that an index of shards lists.

    Raises:
        CheckpointError: It is no index, or names something that is not a file beside it.
    """
    try:
        shards = set(read_json(index, strict=True)["weight_map"].values())
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise ValueError("`weight_map` names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"`{index}` is not a valid index of shards: {error}") from None
    for shard in sorted(shards):
        if shard in {"", ".", ".."} or any(character in shard for character in "/\\\0"):
            raise CheckpointError(
                f"`{index}` names the shard `{shard!r}`, which is outside its folder",
                hint="do not use this checkpoint unless you know who wrote it",
            )
    return sorted(shards)


def _listed_shards(repository: str, index: Path, files: Collection[str]) -> list[str]:
    shards = shard_names(index)
    for shard in shards:
        if shard not in files:
            raise CheckpointError(
                f"`{index.name}` of `{repository}` names the shard `{shard}`, which the repository does not have",
                hint="try another revision",
            )
    return shards


def _hide_bars_off_terminal() -> None:
    from huggingface_hub import constants, utils

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not sys.stderr.isatty():
        utils.disable_progress_bars()


def _from_cache(hub_id: HubId, refusal: AlignError, notify: Callable[[str], None]) -> Path:
    """The cached snapshot, or an error that says why neither the hub nor the cache has it."""
    from huggingface_hub import constants

    folder = _cached_folder(hub_id)
    lost = [] if folder is None else _missing_files(folder)
    if folder is not None and not lost:
        notify(f"{refusal.message}; using the snapshot {folder.name} of {hub_id.repository} in the cache")
        return folder
    if not isinstance(refusal, _UnreachableError):
        raise refusal
    if folder is not None:
        raise _incomplete(folder, lost, f"and {refusal.message}", hint=refusal.hint)
    others = sorted(path.name for path in _repository_folder(hub_id).glob("snapshots/*"))
    raise UsageError(
        f"`{hub_id}` is not a directory, its revision `{hub_id.revision or constants.DEFAULT_REVISION}` is not in the "
        f"hub cache `{constants.HF_HUB_CACHE}`, and {refusal.message}",
        hint=refusal.hint + (f"; what the cache holds is `{hub_id.repository}@{others[0]}`" if others else ""),
    )


def _incomplete(folder: Path, lost: Sequence[str], why: str, *, hint: str) -> CheckpointError:
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return CheckpointError(f"the snapshot `{folder}` lacks `{lost[0]}`{more} {why}", hint=hint)


def _repository_folder(hub_id: HubId) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / f"models--{hub_id.name}"


def _cached_folder(hub_id: HubId) -> Path | None:
    """The snapshot that the cache has for a revision, complete or not."""
    from huggingface_hub import constants

    folder = _repository_folder(hub_id)
    revision = hub_id.revision or constants.DEFAULT_REVISION
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def _missing_files(folder: Path) -> list[str]:
    """What a snapshot lacks of a model: config.json, the weights, or shards that its index lists."""
    if not (folder / CONFIG).is_file():
        return [CONFIG]
    for name in FORMATS:
        if (folder / name).is_file():
            shards = shard_names(folder / name) if name.endswith(_INDEX_SUFFIX) else []
            return [shard for shard in shards if not (folder / shard).is_file()]
    return [name for name in FORMATS if (folder / name).is_symlink()] or [WEIGHTS]  # a link may have lost its blob


def _failures() -> tuple[type[Exception], ...]:
    """What a call to the hub can raise that is not a bug here.

    Version 0 is built on requests, whose errors are OSErrors; version 1 on httpx, whose errors are not. An answer
    that is no JSON is a ValueError, and hf_xet raises RuntimeErrors.
    """
    plain = (OSError, ValueError, RuntimeError)
    try:
        import httpx
    except ImportError:
        return plain
    return (*plain, httpx.HTTPError, httpx.InvalidURL)


def _explain(error: BaseException, hub_id: HubId) -> AlignError:
    """Say in one sentence what the hub's answer means and what to do about it."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    page = f"{constants.ENDPOINT}/{hub_id.repository}"
    has_token = huggingface_hub.get_token() is not None
    elsewhere = f"on a machine that reaches the hub run `{hub_id.download_command}`, or give a local folder"
    if isinstance(error, errors.OfflineModeIsEnabled):
        variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        return _UnreachableError(
            f"offline mode is on (`{variable}` is set)",
            hint=f"unset {variable} and run `{hub_id.download_command}`, or give a local folder",
        )
    if isinstance(error, errors.GatedRepoError):
        return UsageError(
            f"`{hub_id.repository}` is gated and "
            + ("your account has no access to it" if has_token else "you are not logged in"),
            hint=f"ask for access on {page}"
            + ("; the token must be allowed to read gated repositories" if has_token else ", then run `hf auth login`"),
        )
    if isinstance(error, errors.DisabledRepoError):
        return UsageError(f"the hub has disabled `{hub_id.repository}`", hint=f"{page} says why")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"`{hub_id.repository}` is not a directory, and the hub has no "
            + ("model of that name that your token may read" if has_token else "public model of that name"),
            hint="check the spelling, and "
            + ("the token with `hf auth whoami`" if has_token else "log in with `hf auth login` if it is private"),
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(
            f"`{hub_id.repository}` has no branch, tag or commit `{hub_id.revision or constants.DEFAULT_REVISION}`",
            hint=f"see what there is on {page}/tree/{constants.DEFAULT_REVISION}",
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) and not has_token:
        return UsageError(
            f"the hub wants to know who asks for `{hub_id.repository}` (HTTP {status})",
            hint="log in with `hf auth login`",
        )
    if status == 401:
        return UsageError(
            "the hub does not accept your token (HTTP 401)", hint="log in again with `hf auth login`, or unset HF_TOKEN"
        )
    if status == 403:
        return UsageError(
            f"the hub does not let your token read `{hub_id.repository}` (HTTP 403)",
            hint="give the token read access to it, see `hf auth whoami`",
        )
    if status == 429:
        return _UnreachableError(
            f"the hub at {constants.ENDPOINT} has had too many requests from here (HTTP 429)",
            hint=f"wait some minutes{'' if has_token else ' or log in with `hf auth login`'}; {elsewhere}",
        )
    if status is not None:
        return _UnreachableError(
            f"the hub at {constants.ENDPOINT} answers with HTTP {status}",
            hint=f"try again later, check HF_ENDPOINT if it is set; {elsewhere}",
        )
    if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return CheckpointError(
            f"cannot write to the hub cache `{constants.HF_HUB_CACHE}`: {error.strerror}",
            hint="free space there, or set HF_HUB_CACHE to another folder",
        )
    return _UnreachableError(
        f"the hub at {constants.ENDPOINT} cannot be reached ({_root_cause(error)})",
        hint=f"check the network, HTTPS_PROXY and HF_ENDPOINT; {elsewhere}",
    )


def _root_cause(error: BaseException) -> str:
    """The first line of the innermost error: HTTP libraries wrap what the system said several times over."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
