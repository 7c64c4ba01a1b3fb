"""HiCachePages against HiCache's storage interface; the class SGLang loads, where SGLang is installed."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from gaugekit.integrations import sglang
from gaugekit.integrations.sglang import HiCachePages
from kv_blocks import random_bits, same

LAYERS, PAGE, HEADS, WIDTH, PAGES = 2, 16, 2, 8, 4
# dimensions of a host pool as SGLang's MHATokenToKVPoolHost lays it out, and the one that counts tokens or pages
DIMS = {
    "layer_first": ((2, LAYERS, PAGE * PAGES, HEADS, WIDTH), 2, PAGE),
    "page_first": ((2, PAGE * PAGES, LAYERS, HEADS, WIDTH), 1, PAGE),
    "page_first_direct": ((2, PAGES, LAYERS, PAGE, HEADS, WIDTH), 1, 1),
    "page_head": ((2, PAGES, HEADS, PAGE, LAYERS, WIDTH), 1, 1),
}


class Pool:
    """A host pool's pages, by the methods that storage backends call."""

    def __init__(self, layout: str, dtype: torch.dtype = torch.bfloat16):
        self.layout, self.dtype, self.layer_num, self.page_size = layout, dtype, LAYERS, PAGE
        self.head_num, self.head_dim = HEADS, WIDTH
        dims, self.axis, self.step = DIMS[layout]
        sizes = torch.exp(2 * torch.randn(2, LAYERS, 1, HEADS, WIDTH))  # P L S G D
        values = torch.randn(2, LAYERS, PAGE * PAGES, HEADS, WIDTH) * sizes
        if layout == "page_first":
            values = values.transpose(1, 2)
        elif layout != "layer_first":
            values = values.view(2, LAYERS, PAGES, PAGE, HEADS, WIDTH).transpose(1, 2)
            values = values.transpose(2, 4) if layout == "page_head" else values
        self.kv_buffer = values.reshape(dims).to(dtype).contiguous()

    def _page(self, index) -> torch.Tensor:
        start = int(index) if self.step == PAGE else int(index) // PAGE
        return self.kv_buffer.narrow(self.axis, start, self.step)

    def get_data_page(self, index, flat: bool = True) -> torch.Tensor:
        page = self._page(index)
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros_like(self.get_data_page(0))

    def set_from_flat_data_page(self, index, data_page: torch.Tensor) -> None:
        page = self._page(index)
        page.copy_(data_page.reshape(page.shape))


def config(**extra) -> SimpleNamespace:
    fields = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1}
    fields |= {"is_mla_model": False, "should_split_heads": False, "model_name": "org/model", "dp_rank": 0}
    return SimpleNamespace(**{**fields, **extra})


def backend(pool: Pool, folder=None, make=HiCachePages, **options) -> HiCachePages:
    made_of = dict(options) if folder is None else {"directory": str(folder), **options}
    pages = make(config(extra_config=made_of), {})
    pages.register_mem_pool_host(pool)
    pages.register_mem_host_pool_v2(pool, "kv")
    return pages


@pytest.mark.parametrize("layout", DIMS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_pages_come_back_through_every_call(layout, on_disk, tmp_path):
    torch.manual_seed(0)
    pool = Pool(layout)
    pages = backend(pool, tmp_path if on_disk else None)
    plain = pool.kv_buffer.clone()
    keys, starts = [f"hash{i}" for i in range(PAGES)], range(0, PAGE * PAGES, PAGE)
    values = [pool.get_data_page(start) for start in starts]
    assert pages.batch_exists(keys) == 0 and not pages.exists(keys[0]) and pages.get(keys[0]) is None
    assert pages.batch_set(keys[:3], values[:3]) and pages.set(keys[3], values[3])
    assert pages.store.tables is not None and pages.store.tables.shifts.shape == (2, LAYERS, HEADS * WIDTH)
    assert pages.batch_exists([*keys, "none"]) == PAGES and pages.exists(keys[2])
    targets = [pool.get_dummy_flat_data_page() for _ in keys]
    for page, target, value in zip(pages.batch_get(keys, targets), targets, values, strict=True):
        assert page is target and same(page, value)
    pool.kv_buffer.zero_()
    indices = torch.arange(PAGE * PAGES)
    assert pages.batch_get_v1(keys, indices) == [True] * PAGES
    assert same(pool.kv_buffer, plain)
    assert pages.clear() and pages.batch_exists(keys) == 0
    assert pages.batch_set_v1(keys, indices) == [True] * PAGES and pages.batch_exists(keys) == PAGES
    pages.close()
    if on_disk:
        again = backend(Pool(layout), tmp_path)
        assert same(again.get(keys[1]), values[1])
        again.close()


def test_a_page_behind_a_missing_or_damaged_one_is_not_read(tmp_path, caplog):
    pool = Pool("layer_first")
    pages = backend(pool, tmp_path, memory_bytes=0)
    keys = list("abc")
    pages.batch_set(keys, [pool.get_data_page(start) for start in (0, PAGE, 2 * PAGE)])
    assert [page is None for page in pages.batch_get(["a", "none", "c"])] == [False, True, True]
    folder = next(tmp_path.iterdir())
    for path in folder.glob("*.kv"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 4
        path.write_bytes(data)
    assert pages.batch_get(keys) == [None] * 3
    assert "counts as absent" in caplog.text and pages.store.stats().damaged == 1
    assert pages.set("a", pool.get_data_page(0)) and same(pages.get("a"), pool.get_data_page(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_other_dtypes(dtype):
    pool = Pool("page_first", dtype if dtype.is_floating_point else torch.bfloat16)
    pool.kv_buffer = random_bits(pool.kv_buffer.shape, dtype)
    pool.dtype = dtype
    pages = backend(pool)
    assert pages.set("a", pool.get_data_page(PAGE))
    assert torch.equal(pages.get("a").view(torch.uint8), pool.get_data_page(PAGE).view(torch.uint8))
    assert pages.get("a").dtype == dtype


def test_a_latent_cache_has_no_values():
    pool = Pool("layer_first")
    pool.kv_buffer, pool.axis = (
        pool.kv_buffer[0].contiguous(),
        1,
    )  # [L, S, 1, D] in SGLang; D is whatever is left
    pages = backend(pool)
    assert pages.set("a", pool.get_data_page(0)) and same(pages.get("a"), pool.get_data_page(0))
    assert pages.store.tables.shifts.shape == (1, LAYERS, HEADS * WIDTH)


def test_what_does_not_fit_is_not_stored(caplog):
    pool = Pool("layer_first")
    pages = backend(pool, memory_bytes=100)
    assert not pages.set("a", pool.get_data_page(0)) and "not stored" in caplog.text
    assert not pages.batch_set(["a"], [pool.get_data_page(0)])


def test_ranks_and_layouts_have_folders_of_their_own(tmp_path):
    opened = []
    for rank, layout in ((0, "layer_first"), (1, "layer_first"), (0, "page_head")):
        pages = HiCachePages(config(tp_rank=rank, tp_size=2, extra_config={"directory": str(tmp_path)}))
        pages.register_mem_pool_host(Pool(layout))
        opened.append(pages)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"extra_config": {"directroy": "x"}}, "extra_config: expected"),
        ({"should_split_heads": True}, "should_split_heads: expected False"),
        ({"is_mla_model": True, "tp_size": 2}, "tp_size: expected 1"),
    ],
)
def test_what_it_cannot_do_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        HiCachePages(config(**{"extra_config": None, **changed}))


def test_other_pools_and_pages_before_the_pool_are_refused():
    pages = HiCachePages(config(extra_config=None))
    with pytest.raises(ValueError, match="host_pool: expected the pool of keys and values"):
        pages.register_mem_host_pool_v2(None, "mamba")
    with pytest.raises(ValueError, match="register_mem_pool_host"):
        pages.exists("a")


def test_names():
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        sglang.Other  # noqa: B018
    if importlib.util.find_spec("sglang") is None:
        with pytest.raises(ImportError, match="sglang"):
            sglang.GaugekitHiCache  # noqa: B018


def test_inside_sglang(tmp_path):
    """Its own configuration, factory and base class."""
    hicache = pytest.importorskip("sglang.srt.mem_cache.hicache_storage")
    storage = pytest.importorskip("sglang.srt.mem_cache.storage")
    extra = {"backend_name": "gaugekit", "module_path": sglang.__name__, "class_name": "GaugekitHiCache"}
    given = hicache.HiCacheStorageConfig(
        0, 1, 0, 1, 0, 1, False, False, False, "org/m", extra_config={**extra, "directory": str(tmp_path)}
    )
    pool = Pool("page_first")
    pages = storage.StorageBackendFactory.create_backend("dynamic", given, pool)
    assert isinstance(pages, hicache.HiCacheStorage) and not type(pages).__abstractmethods__
    pages.register_mem_pool_host(pool)
    pages.register_mem_host_pool_v2(pool, hicache.PoolName.KV)
    pages.on_host_pools_registered()
    value = pool.get_data_page(0)
    extra_info = hicache.HiCacheStorageExtraInfo(prefix_keys=[])
    assert pages.batch_set(["a"], [value]) and pages.batch_exists(["a", "b"], extra_info) == 1
    assert same(pages.batch_get(["a"], [pool.get_dummy_flat_data_page()])[0], value)
    assert pages.get_stats() is None
    pages.close()
