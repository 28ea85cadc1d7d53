"""The checkpoints of a simulated webui: their names and aliases, and which one is loaded."""

import hashlib
from collections.abc import Sequence
from typing import Final

from gpulane.testing.card import CardUse, Json

FOLDER: Final = "/srv/webui/models/Stable-diffusion"

NOT_ON_GPU: Final = (
    "Expected all tensors to be on the same device, but found at least two devices, cpu and cuda:0! "
    "(when checking argument for argument mat1 in method wrapper_CUDA_addmm)"
)


class Checkpoints:
    """The files, and the one in memory. A title gets its hash when the file was loaded once."""

    def __init__(self, files: Sequence[str], *, hashing: bool) -> None:
        self.files = list(files)
        self.loaded: str | None = None
        """The file whose weights this process holds, on the GPU or not."""
        self.is_on_gpu = False
        self._hashing = hashing
        self._hashed: set[str] = set()

    def sha256(self, file: str) -> str | None:
        return hashlib.sha256(file.encode()).hexdigest() if file in self._hashed else None

    def title(self, file: str) -> str:
        sha256 = self.sha256(file)
        return f"{file} [{sha256[:10]}]" if sha256 else file

    def find(self, alias: str) -> str | None:
        """The file of a title, name, model name or hash; None when no checkpoint is called so."""
        for file in self.files:
            sha256 = self.sha256(file)
            aliases = {file, file.rpartition(".")[0], self.title(file), f"{FOLDER}/{file}"}
            if sha256:
                aliases |= {sha256, sha256[:10], f"{file.rpartition('.')[0]} [{sha256[:10]}]"}
            if alias in aliases:
                return file
        return None

    def as_list(self) -> list[Json]:
        """GET /sdapi/v1/sd-models."""
        return [
            {
                "title": self.title(file),
                "model_name": file.rpartition(".")[0],
                "hash": (self.sha256(file) or "")[:10] or None,
                "sha256": self.sha256(file),
                "filename": f"{FOLDER}/{file}",
                "config": None,
            }
            for file in self.files
        ]

    def hold(self, file: str) -> None:
        """These weights are in this process now, and on the GPU."""
        self.loaded, self.is_on_gpu = file, True
        if self._hashing:
            self._hashed.add(file)

    async def load(self, file: str, card: CardUse, job_id: str) -> None:
        """Load a file in place of the one before."""
        if self.loaded == file and self.is_on_gpu and card.is_resident(file):
            return
        self.loaded, self.is_on_gpu = None, False
        await card.load(file, job_id, keep_others=False)
        self.hold(file)

    def info(self) -> tuple[str, str | None]:
        """`sd_model_name` and `sd_model_hash` of the loaded one."""
        if self.loaded is None:
            return "none", None
        sha256 = self.sha256(self.loaded)
        return self.loaded.rpartition(".")[0], sha256[:10] if sha256 else None
