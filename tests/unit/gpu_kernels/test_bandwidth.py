"""Measurements of a torch device, on the CPU device of torch."""

from gpu_kernels.bandwidth import measure_rates


def test_rates_of_a_device() -> None:
    rates = measure_rates("the CPU", "cpu", side=256)
    assert rates.name == "the CPU"
    assert rates.matvec_bytes_per_s > 1e6
    assert rates.matmul_flops_per_s > 1e6
    assert 1e-8 < rates.op_overhead_s < 1e-1
