"""Arguments of decode_attention for the tests: ragged caches, prefixes of uneven groups."""

import torch

NAN = float("nan")
BOUNDS = ("key_start", "key_end", "prefix_end", "prefix_cu_rows")


def inputs(
    device, batch=4, heads=(4, 2), queries=1, keys=40, width=16, prefixes=0, shared=24,
    dtype=torch.float32, bounds=BOUNDS, seed=0,
):  # fmt: skip
    """Arguments of a call, with NaN in each key that does not exist. prefixes 0: no prefix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def ends(most, count):
        return torch.randint(most + 1, (count,), generator=generator, dtype=torch.int32)

    arguments = {
        "query": 1.5 * normal(batch, heads[0], queries, width),
        "key": normal(batch, heads[1], keys, width),
        "value": normal(batch, heads[1], keys, width),
    }
    given = {"key_end": ends(keys, batch)}
    given["key_start"] = given["key_end"] // 3
    if prefixes:
        arguments["prefix_key"] = normal(prefixes, heads[1], shared, width)
        arguments["prefix_value"] = normal(prefixes, heads[1], shared, width)
        given["prefix_end"] = ends(shared, prefixes)
        given["prefix_cu_rows"] = torch.cat(
            [ends(0, 1), ends(batch, prefixes - 1).sort().values, ends(0, 1) + batch]
        )
    arguments |= {name: x for name, x in given.items() if name in bounds}
    for kind, first, last in (("", "key_start", "key_end"), ("prefix_", None, "prefix_end")):
        for name in (f"{kind}key", f"{kind}value"):
            for b, x in enumerate(arguments.get(name, ())):
                x[:, : arguments[first][b] if first in arguments else 0] = NAN
                x[:, arguments[last][b] if last in arguments else x.shape[1] :] = NAN
    return {name: x.to(device) for name, x in arguments.items()}
