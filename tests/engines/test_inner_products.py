"""Inner products taken block by block are those of the whole vectors."""

import torch

from hybrid_opt.engines import inner_products as module
from hybrid_opt.engines.inner_products import inner_products
from hybrid_opt.engines.local import Gradients, LocalEngine
from tests.conftest import tiny_model


def test_they_are_those_of_whole_vectors(monkeypatch):
    engine = LocalEngine(tiny_model())
    names = [name for name in engine.parameters if "norm" not in name]
    generator = torch.Generator().manual_seed(0)
    vectors = [{n: torch.randn(p.shape, generator=generator) for n, p in engine.parameters.items()} for _ in range(3)]
    flat = torch.stack([torch.cat([v[n].flatten() for n in names]) for v in vectors]).double()
    estimates = [Gradients(v) for v in vectors]
    for size in (1 << 18, 50):  # all of a tensor at once, and a few rows at a time
        monkeypatch.setattr(module, "block_size", lambda device, size=size: size)
        assert torch.allclose(inner_products(engine, names, estimates), flat @ flat.T, rtol=1e-5, atol=1e-3)
        found = inner_products(engine, names, estimates[:1], estimates[1:])
        assert torch.allclose(found, flat[:1] @ flat[1:].T, rtol=1e-5, atol=1e-3)
