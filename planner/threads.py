"""How many threads a model is computed on where nobody says. Knows nothing about how plans are found."""

from planner.gpu_choice import is_simulated
from planner.memory import FLOAT32_BYTES
from planner.question import Here, Question

# Below this mean size of a matrix (float32) a second thread costs more than it brings in decode: 2.09 ms a token with
# one, 2.26 ms with two for matrices of 256 x 256 on two cores of an AMD EPYC, and ten times as long on a busy machine.
SHARED_PRODUCT_BYTES = 1 << 20


def threads_for(question: Question, here: Here) -> int:
    """One thread for products too small to share out, else all there are; a simulated GPU computes on one of them."""
    if question.wish.threads is not None:
        return question.wish.threads
    shape, all_threads = question.shape, here.profile.threads
    products = max(shape.num_matmuls_per_token, 1)
    if FLOAT32_BYTES * shape.active_weights / products < SHARED_PRODUCT_BYTES:
        return 1
    simulated = here.gpu is not None and is_simulated(here.gpu.torch_device)
    return max(all_threads - 1, 1) if simulated else all_threads
