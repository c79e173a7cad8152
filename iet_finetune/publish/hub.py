"""Pushes a finished run to the Hub in one commit, or says in one line how to try again."""

import json
import re
import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_session,
    get_token,
    is_offline_mode,
)

# `HTTPError` is the base class of every error of the client's transport, whichever transport that is.
# HTTPError is passed on there from the transport that the client uses, and not listed in __all__.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

from ..config.settings import HubConfig
from ..errors import UserError, one_line
from .card import THIS_REPOSITORY, name_fault
from .upload_list import CARD_NAME, INDEX_NAME, OWN_FILES, Files, component_names, upload_list

Result = TypeVar("Result")

PAUSES = (1, 2, 4, 8)  # seconds before a request is sent again
SILENCE = 300.0  # seconds without a byte from the server after which a request has failed
PASSING = (408, 429, 500, 502, 503, 504)  # transient failures


def push(output_dir: Path, hub: HubConfig) -> str:
    """Upload the finished run in `output_dir` in one commit and return the URL of the repository.

    Only what `upload_list` names is sent. In the repository the folders of the pipeline's components, and of those
    that an earlier upload had, become what they are here; files outside them that this program did not write stay.

    Raises:
        UserError: the run is not complete, or the push failed: then the line gives the command to push again.
    """
    output_dir = Path(output_dir)
    files = upload_list(output_dir, hub.push_audit_images)
    token = hub.hub_token
    try:
        token = check_push(output_dir, hub)
        return _publish(output_dir, files, hub, token)
    except UserError as error:
        reason = str(error)
    except Exception as error:  # whatever the client, its transport or Xet raises: the run itself is safe
        reason = _reason(error)
    line = f"{reason} The finished pipeline is saved in `{output_dir}`; push it with: {_command(output_dir, hub)}"
    raise UserError(_without_secrets(line, token))


def check_push(output_dir: Path, hub: HubConfig) -> str:
    """Returns the token that `push` will use; needs no network, so that it can be checked before training.

    Raises:
        UserError: no token, a name that the Hub does not take, or `HF_HUB_OFFLINE`.
    """
    if is_offline_mode():
        raise UserError("`HF_HUB_OFFLINE` is set, so nothing can be uploaded: unset it.")
    name = _name(output_dir, hub)
    if fault := name_fault(name):
        raise UserError(f"`--hub_model_id` must be NAME or OWNER/NAME, not {name!r}: {fault}")
    token = (hub.hub_token or get_token() or "").strip()
    if not token:
        raise UserError("no token for the Hub: give `--hub_token`, set `HF_TOKEN`, or log in with `hf auth login`.")
    return token


def _name(output_dir: Path, hub: HubConfig) -> str:
    return hub.hub_model_id or output_dir.resolve().name


def _publish(output_dir: Path, files: Files, hub: HubConfig, token: str) -> str:
    name = _name(output_dir, hub)
    if get_session().timeout.read is None:  # the client's own default is to wait for ever
        get_session().timeout = SILENCE
    api = HfApi(token=token)
    private = True if hub.hub_private_repo else None
    repository = _patiently(lambda: api.create_repo(name, private=private, exist_ok=True))
    if private and _patiently(lambda: api.model_info(repository.repo_id)).private is False:
        raise UserError(f"`--hub_private_repo`: `{repository.repo_id}` exists and is public. Make it private first.")
    card = ModelCard(bytes(files[CARD_NAME]).decode().replace(THIS_REPOSITORY, f'"{repository.repo_id}"'))
    _patiently(card.validate)  # before gigabytes are sent
    _patiently(lambda: _commit(api, repository.repo_id, files | {CARD_NAME: str(card).encode()}))
    return repository.url


def _patiently(call: Callable[[], Result]) -> Result:
    """Retries `call` after each of `PAUSES` while it fails transiently; the client does not retry these requests."""
    for pause in PAUSES:
        try:
            return call()
        except (HTTPError, LocalEntryNotFoundError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in PASSING:
                raise
            time.sleep(pause)
    return call()


def _commit(api: HfApi, repo_id: str, files: Files) -> None:
    # By hand: `upload_folder` leaves out, in silence, what a .gitignore in the repository names, and with Xet makes
    # several commits of one that the Hub refuses for a while, so that a failed push may leave half a pipeline there.
    # Planned anew on each call: if an earlier commit arrived and only its answer was lost, nothing is left to do.
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    deletions = [CommitOperationDelete(path) for path in _stale(api, repo_id, files)]
    api.preupload_lfs_files(repo_id, additions, gitignore_content="")
    api.create_commit(repo_id, [*additions, *deletions], commit_message="Upload a pipeline fine-tuned with IET-AGC")


def _stale(api: HfApi, repo_id: str, files: Files) -> list[str]:
    remote = set(api.list_repo_files(repo_id))
    indices = [bytes(files[INDEX_NAME])] if INDEX_NAME in files else []
    if INDEX_NAME in remote:
        with tempfile.TemporaryDirectory() as folder:
            indices.append(Path(api.hf_hub_download(repo_id, INDEX_NAME, local_dir=folder)).read_bytes())
    folders = {component for index in indices for component in component_names(json.loads(index))}
    ours = {path for path in remote if path in OWN_FILES or "/" in path and path.split("/")[0] in folders}
    return sorted(ours - files.keys())


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if status == 401:
        return "the Hub refused the token (401): give a valid `--hub_token`, or log in with `hf auth login`."
    if status == 403:
        return "the token may not write there (403): use one with write access, or another `--hub_model_id`."
    text = str(cause) if status is None else f"{status}, {getattr(cause, 'server_message', None) or 'no reason given'}"
    text = " ".join(text.split())[:300].rstrip(".") or type(cause).__name__
    if cause is not error:
        text = f"{one_line(error).rstrip('.')}: {text}"
    if isinstance(cause, HTTPError) and status is None:
        return f"the connection to the Hub at {HfApi().endpoint} failed ({text})."
    return f"the push failed ({text})."


def _command(output_dir: Path, hub: HubConfig) -> str:
    """The command that pushes again, without the token."""
    name = "OWNER/NAME" if name_fault(_name(output_dir, hub)) else hub.hub_model_id
    words = ["iet-finetune", "push", str(output_dir)] + (["--hub_model_id", name] if name else [])
    switches = [name for name in ("hub_private_repo", "push_audit_images") if getattr(hub, name)]
    return shlex.join([*words, *(f"--{name}" for name in switches)])


def _without_secrets(line: str, token: str | None) -> str:
    line = re.sub(r"(https?://)[^/@\s]+@", r"\1", line)
    line = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", line)  # signed upload addresses
    line = re.sub(r"hf_[A-Za-z0-9]{30,}", "***", line)
    return line.replace(token.strip(), "***") if token and token.strip() else line
