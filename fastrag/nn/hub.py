"""Model folders: on disk, read from a repository on the Hugging Face Hub, and uploaded to one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fastrag.messages import shown

# Names that transformers and sentence-transformers read; repositories hold the weights in other
# formats as well.
_MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "*.safetensors")
_OTHER_RUNTIMES = ("onnx/*", "openvino/*", "original/*", "coreml/*")
_HUB_ID = re.compile(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?")


def model_folder(
    name: str, source: str | os.PathLike[str], *, holding: str = "", whole: bool = False
) -> Path:
    """Return the folder of a model, whose repository is downloaded if no folder has its name.

    Files that were downloaded before come from the cache of huggingface_hub. In offline mode
    (HF_HUB_OFFLINE=1) only that cache is used.

    Args:
        name: the argument that the source was given for.
        source: a folder, or the id of a repository, such as "intfloat/e5-small-v2".
        holding: description of the folder in the message.
        whole: download all files, not only those of models and tokenizers.

    Raises:
        ValueError: it is neither; the message says what was tried.
    """
    path = Path(source)
    if path.is_dir():
        return path
    expected = f"{name}: expected a model folder{holding} or a Hub id, got {shown(str(source))}"
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise ValueError(f"{expected}: there is no such folder")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    def snapshot(allowed: tuple[str, ...] | None) -> Path:
        files = [*allowed] if allowed else None
        ignored = None if whole else [*_OTHER_RUNTIMES]
        return Path(
            huggingface_hub.snapshot_download(source, allow_patterns=files, ignore_patterns=ignored)
        )

    try:
        folder = snapshot(None if whole else _MODEL_FILES)
        if not whole and not any(folder.rglob("*.safetensors")):
            folder = snapshot((*_MODEL_FILES, "*.bin"))
    except (OSError, HFValidationError) as error:
        if huggingface_hub.constants.is_offline_mode():
            why = "offline mode (HF_HUB_OFFLINE) forbids to ask the Hub"
        else:
            why = f"the Hub does not give it ({str(error).strip().partition(chr(10))[0]})"
        raise ValueError(
            f"{expected}: there is no such folder, no copy in the cache "
            f"{huggingface_hub.constants.HF_HUB_CACHE}, and {why}"
        ) from error
    return folder


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
) -> Any:
    """Upload a folder to a model repository, which is made if there is none.

    Args:
        folder: all of it is uploaded.
        repo_id: such as "me/my-rag".
        private: whether a new repository is private; None: what its owner's default is.
        token: None: the one that `hf auth login` stored.
        revision: branch to upload to; made if there is none. None: main.
        commit_message: the message of the commit.
        create_pr: open a pull request instead of committing.

    Returns:
        huggingface_hub's CommitInfo.

    Raises:
        ValueError: `repo_id` is no name of a repository.
        OSError: the Hub refuses, or cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    made = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(made.repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=made.repo_id,
        folder_path=os.fspath(folder),
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
