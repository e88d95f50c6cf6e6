"""A folder becomes one commit of a repository on the Hub: all of it or nothing, and a failure says how to repeat it."""

import fnmatch
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_NEVER = (".git/*", "*/.git/*", ".cache/*", "*/.cache/*", ".*.part")
_WAITS = (2.0, 8.0)
_PASSING = (408, 409, 412, 429)  # a commit of somebody else's came in between, or too many requests
_OFFLINE = "offline mode is on (HF_HUB_OFFLINE=1), nothing can be pushed: unset it"
_NO_TOKEN = "no token for the Hub: run `hf auth login`, or set HF_TOKEN, with a token that may write"


class UploadError(OSError):
    """The Hub did not take the upload; what was to be uploaded is as it was."""


class PassingUploadError(UploadError):
    """An upload that failed for a reason that may pass by itself: the server, or the way to it."""


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
    replace: Iterable[str] = (),
    space_sdk: str | None = None,
    afterwards: str | None = None,
    waits: Iterable[float] = _WAITS,
) -> CommitInfo:
    """Create the repository if it is not there, and upload a folder as one commit: every file, but no link out of it.

    Files that the Hub has already are not sent again, so an upload that was interrupted is repeated by the same call.
    What passes by itself (5xx, a lost connection, a commit of somebody else) is tried again, on top of the client's
    own attempts for each file.

    Args:
        repo_id: ``ORG/NAME``, or ``NAME`` for the token's owner.
        repo_type: "model", "dataset" or "space"; a Space needs ``space_sdk``.
        private: of a new repository; None is the owner's default.
        revision: a branch, made if it is not there. Default: main.
        ignore: patterns (fnmatch) of paths below ``folder`` that stay here.
        replace: patterns of paths that are deleted from the repository in the same commit unless the folder has them.
        afterwards: how an error ends: what is left here, and how to repeat the upload.
        waits: seconds before the second attempt, the third, ...

    Raises:
        FileNotFoundError: if the folder holds no file to upload.
        UploadError: in one line: what failed, and how to go on. No file of the repository has changed then.
    """
    folder = Path(folder)
    paths = files_to_push(folder, ignore)
    if not paths:
        raise FileNotFoundError(f"nothing to push: {folder} holds no file")
    call = f"push_folder({str(folder)!r}, {repo_id!r})"
    afterwards = afterwards or f"{folder} is whole on this disk; repeat the upload with {call}"
    patterns = list(replace)

    def push() -> CommitInfo:
        with clear_errors(repo_id, afterwards, token):
            api = HfApi(token=token or None, library_name="hf-nullspace")
            name = api.create_repo(
                repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=space_sdk
            ).repo_id
            if revision is not None and revision != "main":
                api.create_branch(name, branch=revision, repo_type=repo_type, exist_ok=True)
            there = api.list_repo_files(name, repo_type=repo_type, revision=revision) if patterns else []
            gone = [path for path in there if path not in paths and _matches(path, patterns)]
            operations = [CommitOperationAdd(path, str(folder / path)) for path in paths]
            return api.create_commit(
                name,
                [*map(CommitOperationDelete, gone), *operations],
                commit_message=commit_message,
                repo_type=repo_type,
                revision=revision,
            )

    return _trying_again(push, list(waits))


def open_repository(
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    afterwards: str,
    waits: Iterable[float] = _WAITS,
) -> str:
    """Create a model repository if it is not there; its whole name.

    Raises:
        UploadError: as :func:`push_folder` does; ``afterwards`` is how it ends.
    """

    def open_it() -> str:
        with clear_errors(repo_id, afterwards, token):
            return HfApi(token=token or None).create_repo(repo_id, private=private, exist_ok=True).repo_id

    return _trying_again(open_it, list(waits))


def whole_name(repo_id: str, token: str | None = None) -> str:
    """``ORG/NAME``; of a ``NAME`` alone the Hub is asked whose the token is.

    Raises:
        UploadError: if it cannot be asked.
    """
    if "/" in repo_id:
        return repo_id
    with clear_errors(repo_id, f"Or write ORG/NAME instead of {repo_id!r}", token):
        return f"{HfApi(token=token or None).whoami()['name']}/{repo_id}"


def files_to_push(folder: Path, ignore: Iterable[str] = (), only: Iterable[str] | None = None) -> list[str]:
    """The files of a folder, relative and sorted; a link that leads out of the folder is never followed.

    Args:
        ignore: patterns (fnmatch) of paths that are not taken.
        only: patterns of paths, compared part by part; nothing else is taken. None: everything is.
    """
    patterns, whole = [*_NEVER, *ignore], folder.resolve()
    inside = (path for path in folder.rglob("*") if path.is_file() and path.resolve().is_relative_to(whole))
    found = (path.relative_to(folder).as_posix() for path in inside)
    return sorted(path for path in found if not _matches(path, patterns) and (only is None or _is_one_of(path, only)))


def left_behind(folder: Path, ignore: Iterable[str] = (), only: Iterable[str] | None = None) -> list[str]:
    """The files and links that :func:`files_to_push` leaves out, but for those that match ``ignore``."""
    ignore = [*_NEVER, *ignore]
    taken = set(files_to_push(folder, ignore, only))
    found = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    return [name for name in names if name not in taken and not _matches(name, ignore)]


@contextmanager
def clear_errors(repo_id: str, afterwards: str, token: str | None = None) -> Iterator[None]:
    """Turn what the Hub and the way to it raise into one line that ends with ``afterwards``.

    Raises:
        UploadError: naming the cause and what to do; ``afterwards`` follows.
    """
    try:
        check_ready(token)
        yield
    except UploadError as error:
        raise UploadError(f"{error}. {afterwards}") from None
    except OfflineModeIsEnabled:
        raise UploadError(f"{_OFFLINE}. {afterwards}") from None
    except HFValidationError as error:
        raise UploadError(f"{repo_id!r} is no repository's name, expected ORG/NAME ({error}). {afterwards}") from error
    except Exception as error:
        cause = _cause(error)
        if (said := _explained(cause, repo_id)) is None:
            raise
        passing = isinstance(cause, HfHubHTTPError) and _may_pass(cause.response.status_code)
        kind = PassingUploadError if passing or not isinstance(cause, HfHubHTTPError | ValueError) else UploadError
        raise kind(f"could not push to {repo_id}: {said}. {afterwards}") from error


def _trying_again(push: Callable[[], Result], waits: list[float]) -> Result:
    for wait in waits:
        try:
            return push()
        except PassingUploadError as error:
            logger.warning("%s; trying again in %g s", str(error).partition(". ")[0], wait)
            time.sleep(wait)
    return push()


def _cause(error: BaseException) -> BaseException:
    """Below what the client wraps around a failure of one large file."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _explained(error: BaseException, repo_id: str) -> str | None:
    """What happened, in words; None for what has nothing to do with the Hub."""
    if isinstance(error, HfHubHTTPError):
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
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
        return f"the connection failed ({type(error).__name__}: {error})"
    if isinstance(error, ConnectionError | TimeoutError):
        return f"the connection failed ({error})"
    if type(error) is RuntimeError or type(error).__module__ == "hf_xet":
        return f"the storage of large files failed ({type(error).__name__}: {error})"
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"the Hub refuses the card ({' '.join(str(error).split())})"
    return None


def _may_pass(status: int) -> bool:
    return status >= 500 or status in _PASSING


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _is_one_of(path: str, patterns: Iterable[str]) -> bool:
    parts = path.split("/")
    return any(
        len(parts) == len(pattern.split("/")) and all(map(fnmatch.fnmatchcase, parts, pattern.split("/")))
        for pattern in patterns
    )
