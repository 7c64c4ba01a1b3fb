"""SGLang's HiCache over a ``KVStore``: its third level, pages of the cache without loss in fewer bytes.

``--hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "gaugekit", "module_path":
"gaugekit.integrations.sglang", "class_name": "GaugekitHiCache", "directory": "/cache", "disk_bytes": 100000000000}'``

Interface: ``sglang.srt.mem_cache.hicache_storage`` of SGLang 0.5. ``GaugekitHiCache`` is made when it is asked for, and
then needs SGLang; ``HiCachePages``, which does the work, does not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gaugekit.codec.kv.store import KVStore
from gaugekit.codec.kv.tables import EXPONENTS
from gaugekit.files.places import beside
from gaugekit.ops.rans.operator import SYMBOLS, CorruptFile

logger = logging.getLogger(__name__)
# the host pool's layouts, as a page of one lies in memory
LAYOUTS = {"layer_first": "PLSGD", "page_first": "PSLGD", "page_first_direct": "PLSGD", "page_head": "PGSLD"}
OPTIONS = {"directory", "memory_bytes", "disk_bytes", "layout", "symbols"}
# what SGLang itself reads from the same dictionary
HOSTS = {"backend_name", "module_path", "class_name", "interface_v1"}


class HiCachePages:
    """A storage backend of HiCache: every page of the host pool one block of a ``KVStore``, under its hash.

    The options "directory", "memory_bytes", "disk_bytes", "layout" and "symbols" are the store's. Each rank of a model
    has a folder of its own in the directory. A page that is damaged is logged and counts as absent, so that SGLang
    computes its tokens anew.

    ValueError for unknown options; for split heads (ranks of another number read parts of a page, which is coded as a
    whole); for latent caches (MLA) on several ranks, which all read what the first has written, while a folder has
    one owner; and for pools other than that of keys and values.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None):
        options = dict(storage_config.extra_config or {})
        if unknown := sorted(set(options) - OPTIONS - HOSTS):
            raise ValueError(f"extra_config: expected {sorted(OPTIONS)}, got {unknown}")
        if storage_config.should_split_heads:
            raise ValueError("should_split_heads: expected False: a coded page is read as a whole")
        if storage_config.is_mla_model and storage_config.tp_size > 1:
            raise ValueError(f"tp_size: expected 1 for a latent cache, got {storage_config.tp_size}")
        self._options = {name: value for name, value in options.items() if name in OPTIONS}
        ranks = (("tp", storage_config.tp_rank, storage_config.tp_size),)
        ranks += (("pp", storage_config.pp_rank, storage_config.pp_size),)
        ranks += (("cp", storage_config.attn_cp_rank, storage_config.attn_cp_size),)
        name = (storage_config.model_name or "model").replace("/", "--")
        self._name = "-".join([name, *(f"{axis}{rank}of{size}" for axis, rank, size in ranks)])
        self._name += f"-dp{getattr(storage_config, 'dp_rank', 0)}"
        self.store: KVStore | None = None

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Opens the store for the pages of this pool."""
        page = mem_pool_host.get_dummy_flat_data_page()
        self.mem_pool_host = mem_pool_host
        self._dtype, self._page = page.dtype, page.numel()
        self._shape, axes = _page_axes(mem_pool_host, page.numel())
        if self._dtype not in EXPONENTS:  # integers of a quantised cache: coded as bytes
            self._shape, axes = (1, -1), "SD"
        options = dict(self._options)
        if (directory := options.pop("directory", None)) is not None:
            kind = f"{self._name}-{mem_pool_host.layout}-{mem_pool_host.page_size}-{self._dtype}".replace(
                "torch.", ""
            )
            directory = beside(Path(directory, kind), "", "")
        self.close()
        self.store = KVStore(directory, axes=axes, tables=None if len(axes) > 2 else False, **options)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """The pool of keys and values is known already; ValueError for any other."""
        if str(host_pool_name) != "kv":
            raise ValueError(
                f"host_pool: expected the pool of keys and values alone, got {str(host_pool_name)!r}"
            )

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """The page under ``key``, flat, in ``target_location`` if one is given; None where it is absent or damaged."""
        try:
            block = self._opened().get(key)
        except (CorruptFile, OSError) as error:
            logger.warning("gaugekit: page %s cannot be read and counts as absent: %s", key, error)
            return None
        if block is None:
            return None
        page = block.view(-1).view(self._dtype)
        if page.numel() != self._page:
            logger.warning("gaugekit: page %s is not of this pool's size and counts as absent", key)
            return None
        return page if target_location is None else target_location.copy_(page)

    def batch_get(
        self,
        keys: Sequence[str],
        target_locations: Sequence[torch.Tensor] | None = None,
        target_sizes: Any = None,
    ) -> list[torch.Tensor | None]:
        """``get`` of each up to the first that is absent; pages behind it are of no use, and None."""
        pages: list[torch.Tensor | None] = []
        for key, target in zip(keys, target_locations or [None] * len(keys), strict=True):
            if pages and pages[-1] is None:
                pages.append(None)
            else:
                pages.append(self.get(key, target))
        return pages

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Whether the page ``value`` is now stored under ``key``; one that is there stays: the key is its hash."""
        store = self._opened()
        if key in store:
            return True
        try:
            page = value.contiguous().view(-1)
            store.put(key, (page if page.dtype in SYMBOLS else page.view(torch.int8)).view(self._shape))
        except (ValueError, OSError) as error:
            logger.warning("gaugekit: page %s is not stored: %s", key, error)
            return False
        return True

    def batch_set(
        self,
        keys: Sequence[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Whether all were stored; ends at the first that was not."""
        return all(self.set(key, value) for key, value in zip(keys, values or [], strict=True))

    def batch_get_v1(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Reads pages into the host pool, at every ``page_size``-th of ``host_indices``."""
        pages = self.batch_get(keys)
        for place, page in zip(host_indices[:: self.mem_pool_host.page_size], pages, strict=True):
            if page is not None:
                self.mem_pool_host.set_from_flat_data_page(place, page)
        return [page is not None for page in pages]

    def batch_set_v1(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Stores pages of the host pool."""
        places = host_indices[:: self.mem_pool_host.page_size]
        return [
            self.set(key, self.mem_pool_host.get_data_page(place, flat=True))
            for key, place in zip(keys, places, strict=True)
        ]

    def exists(self, key: str) -> bool:
        """Whether the page is stored."""
        return key in self._opened()

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """How many of the first keys are stored."""
        store = self._opened()
        return next((count for count, key in enumerate(keys) if key not in store), len(keys))

    def clear(self) -> bool:
        """Removes every page."""
        self._opened().clear()
        return True

    def close(self) -> None:
        """Lets another process have the folder."""
        if self.store is not None:
            self.store.close()

    def _opened(self) -> KVStore:
        if self.store is None:
            raise ValueError("mem_pool_host: expected register_mem_pool_host before any page")
        return self.store


def _page_axes(pool: Any, elements: int) -> tuple[tuple[int, ...], str]:
    """The shape and axes of a page, without those of size one that a layout has; flat where they cannot be told."""
    axes = LAYOUTS.get(pool.layout)
    sizes = {"P": 2, "L": pool.layer_num, "S": pool.page_size}
    sizes["G"], sizes["D"] = getattr(pool, "head_num", 1), getattr(pool, "head_dim", 0)
    if axes is not None and elements == 2 * pool.layer_num * pool.page_size * sizes["G"] * sizes["D"]:
        return tuple(sizes[letter] for letter in axes), axes
    tokens = pool.layer_num * pool.page_size
    if (
        axes is not None and pool.layout != "page_head" and elements % tokens == 0
    ):  # a latent cache: no values
        order = "".join(letter for letter in axes if letter in "LSD")
        sizes["D"] = elements // tokens
        return tuple(sizes[letter] for letter in order), order
    return (1, -1), "SD"


def __getattr__(name: str) -> Any:
    if name != "GaugekitHiCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

    backend = globals()[name] = type(
        name, (HiCachePages, HiCacheStorage), {"__doc__": HiCachePages.__doc__, "__module__": __name__}
    )
    return backend
