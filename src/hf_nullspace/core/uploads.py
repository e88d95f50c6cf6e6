"""A folder becomes one commit of a repository on the Hub: all of it or nothing, and a failure says how to repeat it.

The client repeats neither a commit nor the creation of a repository, its ``upload_folder`` may make several commits.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

WAITS = (2.0, 8.0)  # seconds before the second attempt and the third
_NEVER = (".git/*", "*/.git/*", ".cache/*", "*/.cache/*", ".*.part")
_PASSING = (408, 409, 412, 429)  # a commit of somebody else's came in between, or too many requests
_CONNECTION = ("httpx", "httpx2", "httpcore", "httpcore2")
_OFFLINE = "offline mode is on (HF_HUB_OFFLINE=1), nothing can be pushed: unset it"
_NO_TOKEN = "no token for the Hub: run `hf auth login`, or set HF_TOKEN, with a token that may write"


class UploadError(OSError):
    """The Hub did not take the upload; what was to be uploaded is as it was."""


def check_ready(token: str | None = None) -> None:
    """Before long work: can anything be pushed at all? Asks nobody.

    Raises:
        UploadError: in offline mode, or if there is no token.
    """
    if is_offline_mode():
        raise UploadError(_OFFLINE)
    if not token and get_token() is None:
        raise UploadError(_NO_TOKEN)


def push_folder(
    folder: Path | str,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with hf-nullspace",
    token: str | None = None,
    ignore: Iterable[str] = (),
    replace: Collection[str] = (),
    space_sdk: str | None = None,
    afterwards: str | None = None,
) -> CommitInfo:
    """Create the repository if it is not there, and upload a folder as one commit: every file, but no link out of it.

    Files that the Hub has already are not sent again, so an upload that was interrupted is repeated by the same call.

    Args:
        repo_id: ``ORG/NAME``, or ``NAME`` for the token's owner.
        repo_type: "model", "dataset" or "space"; a Space needs ``space_sdk``.
        private: of a new repository; None is the owner's default.
        revision: a branch, made if it is not there. Default: main.
        ignore: patterns (fnmatch) of paths below ``folder`` that stay here.
        replace: patterns of paths that are deleted from the repository in the same commit unless the folder has them.
        afterwards: how an error ends: what is left here, and how to repeat the upload.

    Raises:
        FileNotFoundError: if the folder holds no file to upload.
        UploadError: in one line: what failed, and how to go on. No file of the repository has changed then.
    """
    folder = Path(folder)
    paths = files_to_push(folder, ignore)
    if not paths:
        raise FileNotFoundError(f"nothing to push: {folder} holds no file")
    call = f"push_folder({str(folder)!r}, {repo_id!r})"

    def push(api: HfApi) -> CommitInfo:
        name = api.create_repo(
            repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=space_sdk
        ).repo_id
        if revision is not None and revision != "main":
            api.create_branch(name, branch=revision, repo_type=repo_type, exist_ok=True)
        there = api.list_repo_files(name, repo_type=repo_type, revision=revision) if replace else []
        gone = [path for path in filter_repo_objects(there, allow_patterns=list(replace)) if path not in paths]
        added = [CommitOperationAdd(path, str(folder / path)) for path in paths]
        return api.create_commit(
            name,
            [*map(CommitOperationDelete, gone), *added],
            commit_message=commit_message,
            repo_type=repo_type,
            revision=revision,
        )

    return _ask(push, repo_id, token, afterwards or f"{folder} is whole on this disk; repeat the upload with {call}")


def open_repository(repo_id: str, *, private: bool | None = None, token: str | None = None, afterwards: str) -> str:
    """Create a model repository if it is not there; its whole name. Raises as :func:`push_folder` does."""
    return _ask(
        lambda api: api.create_repo(repo_id, private=private, exist_ok=True), repo_id, token, afterwards
    ).repo_id


def whole_name(repo_id: str, token: str | None = None) -> str:
    """``ORG/NAME``; of a ``NAME`` alone the Hub is asked for the owner of the token, else ``UploadError``."""
    if "/" in repo_id:
        return repo_id
    otherwise = f"Or write ORG/NAME instead of {repo_id!r}"
    return f"{_ask(HfApi.whoami, repo_id, token, otherwise)['name']}/{repo_id}"


def files_to_push(folder: Path, ignore: Iterable[str] = (), only: Iterable[str] | None = None) -> list[str]:
    """The files of a folder, relative and sorted; a link that leads out of the folder is never followed.

    Args:
        ignore: patterns (fnmatch) of paths that are not taken.
        only: patterns of paths, in which "*" matches no "/"; nothing else is taken. None: everything is.
    """
    whole = folder.resolve()
    inside = (path for path in folder.rglob("*") if path.is_file() and path.resolve().is_relative_to(whole))
    names = _without(inside, folder, ignore)
    return names if only is None else [name for name in names if any(_is_at(name, pattern) for pattern in only)]


def left_behind(folder: Path, ignore: Iterable[str] = (), only: Iterable[str] | None = None) -> list[str]:
    """The files and links that :func:`files_to_push` leaves out, but for those that match ``ignore``."""
    taken = files_to_push(folder, ignore, only)
    found = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return [name for name in _without(found, folder, ignore) if name not in taken]


def _without(paths: Iterable[Path], folder: Path, ignore: Iterable[str]) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    return list(filter_repo_objects(names, ignore_patterns=[*_NEVER, *ignore]))


def _is_at(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _ask(call: Callable[[HfApi], Result], repo_id: str, token: str | None, afterwards: str) -> Result:
    """What ``call`` returns; after a failure that may pass it is called again.

    Raises:
        UploadError: for what the Hub and the way to it raise, in one line that ends with ``afterwards``.
    """
    try:
        check_ready(token)
    except UploadError as error:
        raise UploadError(f"{error}. {afterwards}") from None
    waits = iter(WAITS)
    while True:
        try:
            return call(HfApi(token=token or None, library_name="hf-nullspace"))
        except HFValidationError as error:
            reason = f"{repo_id!r} is no repository's name, expected ORG/NAME ({error})"
            raise UploadError(f"{reason}. {afterwards}") from error
        except Exception as error:
            found = _explained(error, repo_id)
            if found is None:
                raise
            reason, may_pass = found
            wait = next(waits, None) if may_pass else None
            if wait is None:
                raise UploadError(f"could not push to {repo_id}: {reason}. {afterwards}") from error
            logger.warning("could not push to %s: %s; trying again in %g s", repo_id, reason, wait)
            time.sleep(wait)


def _explained(error: BaseException, repo_id: str) -> tuple[str, bool] | None:
    """What happened, and whether it may pass by itself; None for what has nothing to do with the Hub."""
    while type(error) is RuntimeError and error.__cause__ is not None:  # the client wraps the failure of a large file
        error = error.__cause__
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, repo_id), error.response.status_code >= 500 or error.response.status_code in _PASSING
    if library in _CONNECTION:
        return f"the connection failed ({type(error).__name__}: {error})", True
    if isinstance(error, ConnectionError | TimeoutError):
        return f"the connection failed ({error})", True
    if type(error) is RuntimeError or library == "hf_xet":
        return f"the storage of large files failed ({type(error).__name__}: {error})", True
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"the Hub refuses the card ({' '.join(str(error).split())})", False
    return None


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "the Hub does not know the token (401); make one that may write, then `hf auth login` or HF_TOKEN"
    if status == 403:
        return f"the token may not write there (403); use one of a member of {repo_id.partition('/')[0]!r}"
    if status in (401, 404):
        return f"no such repository, or the token may not see it ({status})"
    if status in (409, 412):
        return f"somebody else changed the repository at the same time ({status})"
    reason = error.server_message or error.response.reason_phrase
    return f"the server failed ({status}: {reason})" if status >= 500 else f"refused ({status}: {reason})"
