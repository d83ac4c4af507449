"""A decoding loop over a paged cache: requests of different lengths grow by a token a step, through several layers.

python examples/decode_loop.py            on the GPU if there is a Hopper, else on the CPU
"""

from __future__ import annotations

import torch
from flash_mla import flash_mla_with_kvcache

NUM_LAYERS, NUM_HEADS, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE = 4, 16, 576, 512, 64


class PagedCache:
    """One pool of pages per layer, and one block table for all: a page is handed out when a request needs it."""

    def __init__(self, batch_size: int, max_pages: int, device: torch.device) -> None:
        shape = (NUM_LAYERS, batch_size * max_pages, PAGE_SIZE, 1, HEAD_DIM)
        self.pools = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.block_table = torch.zeros(batch_size, max_pages, dtype=torch.int32, device=device)
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self._lengths = [0] * batch_size
        self._free = list(range(batch_size * max_pages))

    def reserve_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for one more token of each request: its page and its place there."""
        for request, length in enumerate(self._lengths):
            if length % PAGE_SIZE == 0:
                self.block_table[request, length // PAGE_SIZE] = self._free.pop()
            self._lengths[request] += 1
        last = self.cache_seqlens.long()
        self.cache_seqlens += 1
        pages = self.block_table.gather(1, (last // PAGE_SIZE)[:, None]).squeeze(1).long()
        return pages, last % PAGE_SIZE


def main() -> None:
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    device = torch.device("cuda" if is_hopper else "cpu")
    batch_size, num_steps = 3, 100
    cache = PagedCache(batch_size, max_pages=4, device=device)
    torch.manual_seed(0)

    for _ in range(num_steps):
        pages, places = cache.reserve_token()
        for pool in cache.pools:
            # A model would compute these two from the token's hidden state.
            pool[pages, places, 0] = torch.randn(batch_size, HEAD_DIM, device=device).bfloat16()
            q = torch.randn(batch_size, 1, NUM_HEADS, HEAD_DIM, device=device).bfloat16()
            out, lse = flash_mla_with_kvcache(q, pool, cache.block_table, cache.cache_seqlens, HEAD_DIM_V)
    print(f"{num_steps} steps of {NUM_LAYERS} layers on {device}: out {tuple(out.shape)}, lse {tuple(lse.shape)}")


if __name__ == "__main__":
    main()
