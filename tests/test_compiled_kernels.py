"""The GPU's kernels compile for GPUs, where there is none."""
import pytest
import torch

triton = pytest.importorskip('triton')
from triton.backends.compiler import GPUTarget  # noqa: E402

from timm_dense2net import norm_kernels  # noqa: E402
from timm_dense2net.norm_kernels import KernelNorm, new_sums  # noqa: E402

POINTERS = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.int64: '*i64'}
# Bytes that a program has on any GPU without asking for more.
SHARED_MEMORY = 48 * 1024


def source(kernel, values):
    """What a launch with these values compiles: Triton is told which addresses and sizes 16 divides, and what is 1."""
    signature, constants, facts = {}, {}, {}
    for index, (param, value) in enumerate(zip(kernel.params, values)):
        is_pointer = isinstance(value, torch.Tensor)
        if param.is_constexpr or (not is_pointer and value == 1):
            signature[param.name], constants[param.name] = 'constexpr', value
            continue
        signature[param.name] = POINTERS[value.dtype] if is_pointer else 'i32'
        if (value.data_ptr() if is_pointer else value) % 16 == 0:
            facts[index,] = [['tt.divisibility', 16]]
    return triton.compiler.ASTSource(kernel, signature, constants, facts)


def launch_all(rows, channels, dtype):
    """As training does, on maps of this dtype; what the kernels compute does not matter."""
    x, norm = torch.ones((rows, channels), dtype=dtype), KernelNorm(*torch.ones((4, channels)), 1e-5)
    sums, batches = new_sums(x, norm), torch.tensor(0)
    norm_kernels.moments(x, norm.mean, norm.var, (norm.mean, norm.var, batches), 0.1)
    norm_kernels.moments(x, norm.mean, norm.var, copy=x)
    norm_kernels.norm_relu(x, norm)
    norm_kernels.join(x, norm, x, norm, x)
    for adds in (False, True):
        norm_kernels.norm_relu_backward(x, x, norm, x, sums, adds)
    norm_kernels.join_backward(x, x, norm, x, sums, x, norm, x, x, sums)
    norm_kernels.add_stats_gradient(x, x, norm.mean, norm_kernels.norm_gradients(sums, norm)[2:], x)


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('dtype, channels', [(torch.float32, 16), (torch.bfloat16, 65)])
def test_all_kernels_compile(capability, dtype, channels, monkeypatch, tmp_path):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    names = set()

    def compile_only(kernel, *values, grid, warmup):
        done = triton.compile(source(kernel, values), GPUTarget('cuda', capability, 32))
        assert done.asm['cubin'].startswith(b'\x7fELF') and done.metadata.shared <= SHARED_MEMORY
        names.add(kernel.__name__)

    monkeypatch.setattr(triton.JITFunction, 'run', compile_only)
    launch_all(4096, channels, dtype)
    assert names == {name for name in vars(norm_kernels) if name.endswith('_kernel')}
