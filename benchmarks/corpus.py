"""Encode a corpus of a gigabyte: speed, memory, and the time of a second start.

python benchmarks/corpus.py --megabytes 1000
"""

import argparse
import hashlib
import os
import resource
import tempfile
import time
from pathlib import Path

from genkit.data import character_corpus, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ["GENKIT_CACHE"] = str(Path(work) / "cache")
        for name, symbols in {"ASCII": "", "with accents": " déjà vu, naïve, \N{SNOWMAN}"}.items():
            path = Path(work) / "corpus.txt"
            size = write_corpus(path, arguments.megabytes * 10**6, symbols)
            first = time_reading(path)
            second = time_reading(path)
            print(
                f"{name}: {size / 1e6:,.0f} MB encoded at {size / 1e6 / first:,.0f} MB/s "
                f"({first:.1f} s), second start {second:.2f} s"
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GB")


def write_corpus(path: Path, size: int, symbols: str) -> int:
    """Repeat the embedded corpus, each time after a random line, so that no two parts are equal."""
    prose = "".join(piece for document in text.read_documents(text.EMBEDDED) for piece in document)
    prose = prose.encode("ascii", "ignore").decode() + symbols
    with path.open("w", encoding="utf-8", newline="") as file:
        for i in range(size // len(prose.encode())):
            file.write(f"{hashlib.sha256(str(i).encode()).hexdigest()}\n{prose}")
    return path.stat().st_size


def time_reading(path: Path) -> float:
    start = time.monotonic()
    character_corpus.read_characters(str(path), "text", None, val_fraction=0.1, context=256)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
