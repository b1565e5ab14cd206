"""Archives of published data sets: downloaded, checked, and unpacked as a whole or not at all."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from effvit.errors import DatasetError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A published archive.

    Attributes:
        url: Where it is.
        md5: Its hash.
        folder: What it unpacks to.
    """

    url: str
    md5: str
    folder: str

    def fetch(self, root: Path) -> None:
        """Downloads and unpacks it below a folder, unless it is there.

        One process of a machine does so while the others wait. An archive that was downloaded before is used.

        Raises:
            DatasetError: It cannot be fetched, or is another file than was published.
        """
        from filelock import FileLock  # comes with torch
        from torchvision.datasets import utils

        name = Path(self.url).name
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if (root / self.folder).is_dir():
                return
            work = Path(tempfile.mkdtemp(prefix=f".{self.folder}-", dir=root))
            try:
                _log.info("downloading %s to %s", self.url, root)
                utils.download_url(self.url, root, name, self.md5)
                utils.extract_archive(str(root / name), str(work))
                (work / self.folder).rename(root / self.folder)
            except Exception as error:  # torchvision raises whatever urllib, tarfile or zipfile raise
                raise DatasetError(
                    f"{self.url} cannot be fetched to {root}: {str(error) or repr(error)}. Put {name} there yourself "
                    f"(MD5 {self.md5}), or unpack it so that {root / self.folder} is there"
                ) from error
            finally:
                shutil.rmtree(work, ignore_errors=True)
