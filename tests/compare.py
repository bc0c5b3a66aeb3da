"""What checkpoints, metrics and measurements hold, compared number by number: exactly, or within a tolerance."""

import pytest
import torch


def assert_close(a: object, b: object, where: str, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert type(a) is type(b), where
    if isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in b:
            assert_close(a[key], b[key], f"{where}.{key}", rtol, atol)
    elif isinstance(b, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{where}[{i}]", rtol, atol)
    elif isinstance(b, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text: f"{where}: {text}")
    else:
        assert a == (pytest.approx(b, rel=rtol, abs=atol) if isinstance(b, float) else b), where
