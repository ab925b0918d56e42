"""The compiled kernels; tensors are passed as addresses, in lists of numbers."""

def make_decoder(numbers: list[float]) -> object:
    """Describe a decoder once, for many steps."""

def run(decoder: object, numbers: list[int], threads: int) -> None:
    """Do one step of a decoder."""

def write(decoder: object, step: list[int], choice: list[float], threads: int) -> int:
    """Do steps for as long as their tokens are sure; return how many."""

def multiply(numbers: list[int]) -> None:
    """Multiply rows by a packed matrix."""

def quantize(numbers: list[int]) -> None:
    """Fill the blocks of a matrix with its weights."""

def round_rows(numbers: list[int]) -> None:
    """Round rows to 8 bits with one scale each."""

def scale_sums(numbers: list[int]) -> None:
    """Scale sums of levels of 8 bits by row and output, and add a bias."""

def embed(numbers: list[int]) -> None:
    """Copy rows of a packed matrix."""

def share_threads(addresses: list[int]) -> None:
    """Run on the threads of an OpenMP: by GOMP_parallel and what tells a thread which it is."""

def target() -> str:
    """Return the name of the kernels in use."""

def list_targets() -> list[str]:
    """List the kernels that this CPU runs, best first."""

def use_target(name: str) -> None:
    """Use other kernels, for tests."""
