"""The convolution that static pruning leaves behind: a small core between two rotations."""

from torch import Tensor, nn

from models.convolution import SafeConv2d


class LowRankConv2d(nn.Module):
    """Convolution in a reduced basis: 1x1 (in -> c), the core k x k (c -> r), 1x1 (r -> out).

    Source: EigenDamage (arXiv:1905.05934), section 4 and figure 1.  A side that keeps all its directions may go
    without its rotation, since an orthogonal rotation that drops nothing can be merged into the core.

    Args:
        in_channels, out_channels: channels outside.
        kernel_size, stride, padding: of the core; the rotations are 1x1 with stride 1.
        rank_in: c, or None for a core that reads the input as it is.
        rank_out: r, or None for a core that writes the output as it is.
        depthwise: whether every channel of the core is filtered on its own, c = r: the depthwise separable form.

    There is no bias, as in every convolution of the network: a batch norm follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        rank_in: int | None,
        rank_out: int | None,
        depthwise: bool = False,
    ):
        super().__init__()
        core_in = in_channels if rank_in is None else rank_in
        core_out = out_channels if rank_out is None else rank_out
        self.rotate_in = None if rank_in is None else nn.Conv2d(in_channels, core_in, 1, bias=False)
        self.core = SafeConv2d(
            core_in, core_out, kernel_size, stride, padding, bias=False, groups=core_in if depthwise else 1
        )
        self.rotate_out = None if rank_out is None else nn.Conv2d(core_out, out_channels, 1, bias=False)

    # Of the whole layer, as of the plain convolution that it stands for.
    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.core.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        return self.core.stride

    @property
    def padding(self) -> tuple[int, int]:
        return self.core.padding

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W']."""
        if self.rotate_in is not None:
            x = self.rotate_in(x)
        x = self.core(x)
        return x if self.rotate_out is None else self.rotate_out(x)
