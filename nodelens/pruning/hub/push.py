"""Upload of a saved pruned model to the hub."""

from pathlib import Path
from typing import Any


def push_folder(folder: Path, repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """Creates the repository if it is not there, uploads the files of a folder, and returns the address of the commit.

    Raises OSError, in one line, if the hub cannot be reached or refuses; ValueError for an id that is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        api: Any = HfApi(token=token, library_name="nodelens")
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="Add the pruned model", ignore_patterns=[".*", ".lock*"]
        )
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no id of the hub, such as user/name: {_first_line(error)}") from error
    except Exception as error:  # of the network, the hub, or a login, by classes of several libraries
        raise OSError(
            f"{repo_id} was not pushed ({type(error).__name__}: {_first_line(error)}): log in with `hf auth login`, or save the "
            f"model, pruned.save(folder), and upload the folder where the hub can be reached: `hf upload {repo_id} folder`"
        ) from error
    return str(commit)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given").rstrip(".")
