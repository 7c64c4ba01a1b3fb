"""KVSerializer and KVDeserializer against LMCache's serde interface; LMCache's own processor, where it is installed."""

import importlib.util
import time
from types import SimpleNamespace

import pytest
import torch

from gaugekit.codec import CorruptFile
from gaugekit.integrations import lmcache
from gaugekit.integrations.lmcache import KVDeserializer, KVSerializer
from kv_blocks import random_bits


class Memory:
    """A memory object, by what a serde reads of it: one tensor, or one for each group, in one buffer."""

    def __init__(self, tensors: list[torch.Tensor], memory_format: str = "KV_2LTD", groups: bool = False):
        self.buffer = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])
        self.shapes, self.dtypes = [t.shape for t in tensors], [t.dtype for t in tensors]
        self.metadata = SimpleNamespace(shapes=self.shapes if groups else None)
        self._format = SimpleNamespace(name=memory_format)

    def get_memory_format(self):
        return self._format

    @property
    def tensor(self) -> torch.Tensor:
        return self.get_tensor(0)

    def get_tensor(self, index: int) -> torch.Tensor:
        sizes = [
            shape.numel() * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        start = sum(sizes[:index])
        return self.buffer[start : start + sizes[index]].view(self.dtypes[index]).view(self.shapes[index])

    @property
    def layout(self):
        return SimpleNamespace(shapes=self.shapes, dtypes=self.dtypes)


def blank(memory: Memory) -> Memory:
    tensors = [torch.zeros(s, dtype=d) for s, d in zip(memory.shapes, memory.dtypes, strict=True)]
    return Memory(tensors, memory._format.name, memory.metadata.shapes is not None)


def cache(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[..., S, D]: channels keep their size."""
    sizes = torch.exp(2 * torch.randn(*shape[:-2], 1, shape[-1]))
    return (torch.randn(shape) * sizes).to(dtype)


def through(serializer: KVSerializer, memory: Memory) -> tuple[int, Memory, Memory]:
    """(bytes, the buffer as it is loaded, with whatever lies behind, what it is restored to)."""
    size = serializer.estimate_serialized_size(memory.layout)
    buffer = Memory([torch.full((size,), 0x5A, dtype=torch.uint8)], "BINARY_BUFFER")
    used = serializer.serialize(memory, buffer, key=None)
    restored = blank(memory)
    KVDeserializer().deserialize(buffer, restored, key=None)
    return used, buffer, restored


@pytest.mark.parametrize(
    ("memory_format", "shape"),
    [
        ("KV_2LTD", (2, 3, 64, 32)),
        ("KV_MLA_FMT", (1, 3, 64, 32)),
        ("KV_2TD", (2, 64, 32)),
        ("OTHER", (5, 64, 32)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_objects_come_back(memory_format, shape, dtype):
    torch.manual_seed(0)
    memory = Memory([cache(*shape, dtype=dtype)], memory_format)
    used, _, restored = through(KVSerializer(room=0), memory)
    assert torch.equal(restored.buffer, memory.buffer)
    assert used < (0.8 if dtype == torch.bfloat16 else 1.1) * memory.buffer.numel() + 500


@pytest.mark.parametrize("layout", ["rans", "fixed"])
def test_groups_of_any_dtype_and_any_bits_come_back_within_the_estimate(layout):
    shapes = [(2, 3, 40, 16), (40, 2, 16), (8, 11), (3,)]
    dtypes = [torch.bfloat16, torch.uint8, torch.float32, torch.int64]
    tensors = [random_bits(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    memory = Memory(tensors, "UNDEFINED", groups=True)
    serializer = KVSerializer(layout=layout, room=0)
    for _ in range(2):  # the second time with the tables of the first
        _, _, restored = through(serializer, memory)
        assert torch.equal(restored.buffer, memory.buffer)


def test_the_tables_of_the_first_object_serve_the_next_and_need_no_other_file():
    torch.manual_seed(0)
    sizes = torch.exp(2 * torch.randn(2, 3, 1, 32))
    serializer = KVSerializer(room=0)
    first, second, short = ((torch.randn(2, 3, n, 32) * sizes).bfloat16() for n in (256, 256, 8))
    for tensor in (short, first, second, short):
        memory = Memory([tensor])
        used, _, restored = through(serializer, memory)
        assert torch.equal(restored.buffer, memory.buffer)
    assert len(serializer._codecs) == 1
    plain, *_ = through(
        KVSerializer(axes="LSD", room=0), Memory([second], "UNDEFINED")
    )  # dimensions unknown: no tables
    used, *_ = through(serializer, Memory([second]))
    assert used < 0.98 * plain


def test_every_object_of_a_shape_takes_the_same_bytes():
    torch.manual_seed(0)
    for dtype, room in ((torch.bfloat16, 0.75), (torch.float16, 0.9)):
        memory = Memory([cache(2, 3, 64, 32, dtype=dtype)])
        used, buffer, restored = through(KVSerializer(), memory)
        assert used == buffer.buffer.numel() == int(room * memory.buffer.numel()) + 2048
        assert torch.equal(restored.buffer, memory.buffer)
    used, *_ = through(KVSerializer(room=0.8), Memory([cache(2, 3, 64, 32)]))
    assert used == int(0.8 * 2 * 3 * 64 * 32 * 2) + 2048
    with pytest.raises(ValueError, match=r"src: expected an object that takes at most .* \(room\)"):
        through(KVSerializer(), Memory([random_bits((2, 3, 64, 32), torch.bfloat16)]))


def test_every_flipped_byte_is_an_error():
    memory = Memory([cache(2, 1, 16, 4)])
    used, buffer, _ = through(KVSerializer(room=0), memory)
    for place in range(used):
        buffer.buffer[place] ^= 0x10
        with pytest.raises(CorruptFile):
            KVDeserializer().deserialize(buffer, blank(memory), None)
        buffer.buffer[place] ^= 0x10
    buffer.buffer[used:] = 0  # what lies behind it does not count
    KVDeserializer().deserialize(buffer, blank(memory), None)
    with pytest.raises(CorruptFile, match="cut short"):
        KVDeserializer().deserialize(Memory([buffer.buffer[: used - 1]]), blank(memory), None)
    with pytest.raises(CorruptFile, match="not the block of this object"):
        KVDeserializer().deserialize(buffer, Memory([torch.zeros(3, dtype=torch.bfloat16)]), None)


def test_bad_input():
    memory = Memory([cache(2, 1, 16, 4)])
    with pytest.raises(ValueError, match="dst: expected .* bytes or more"):
        KVSerializer().serialize(memory, Memory([torch.zeros(10, dtype=torch.uint8)]), None)
    for options, name in (({"layout": "zip"}, "layout"), ({"axes": "ABC"}, "axes"), ({"room": 2}, "room")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            KVSerializer(**options)
    if importlib.util.find_spec("lmcache") is None:
        with pytest.raises(ImportError, match="lmcache"):
            lmcache.register()


def test_inside_lmcache():
    """Its own registry, processor, keys and memory objects."""
    serde = pytest.importorskip("lmcache.v1.distributed.serde")
    memory = pytest.importorskip("lmcache.v1.memory_management")
    api = pytest.importorskip("lmcache.v1.distributed.api")
    lmcache.register()
    lmcache.register()

    def wrapped(tensor, memory_format):
        raw = tensor.contiguous().view(-1).view(torch.uint8).clone()
        fields = (tensor.shape, tensor.dtype, 0, raw.numel(), 1, 0, memory_format, None, [tensor.shape])
        return memory.TensorMemoryObj(raw, memory.MemoryObjMetadata(*fields, [tensor.dtype]), None)

    def finished(query, task):
        for _ in range(1000):
            if (result := query(task)) is not None:
                return result
            time.sleep(0.01)
        raise TimeoutError

    with pytest.raises(ValueError, match="serde: expected options"):
        serde.create_serde_processor(serde.SerdeConfig("gaugekit", {"levle": 3}))
    processor = serde.create_serde_processor(serde.SerdeConfig("gaugekit", {"max_workers": 2, "room": 0}))
    tensor, key = cache(2, 3, 64, 32), api.ObjectKey(b"k" * 32, "model", 0)
    kind = memory.MemoryFormat.KV_2LTD
    layout = api.MemoryLayoutDesc([tensor.shape], [tensor.dtype])
    room = torch.zeros(processor.estimate_serialized_size(layout), dtype=torch.uint8)
    source, coded, restored = (
        wrapped(tensor, kind),
        wrapped(room, kind),
        wrapped(torch.zeros_like(tensor), kind),
    )
    assert finished(processor.query_serialize_result, processor.submit_serialize([source], [coded], [key]))
    assert coded.get_size() < 0.8 * tensor.nbytes
    assert finished(
        processor.query_deserialize_result, processor.submit_deserialize([coded], [restored], [key])
    )
    assert torch.equal(restored.raw_data, source.raw_data)
    coded.raw_data[100] ^= 1
    assert not finished(
        processor.query_deserialize_result, processor.submit_deserialize([coded], [restored], [key])
    )
    processor.close()


def test_inside_lmcaches_second_level(tmp_path):
    """From its first level through its wrapper and its adapter of files, and back; a damaged file is a miss."""
    config = pytest.importorskip("lmcache.v1.distributed.config")
    l1 = pytest.importorskip("lmcache.v1.distributed.l1_manager")
    files = pytest.importorskip("lmcache.v1.distributed.l2_adapters.fs_l2_adapter")
    wrapper = pytest.importorskip("lmcache.v1.distributed.l2_adapters.serde_wrapper")
    serde = pytest.importorskip("lmcache.v1.distributed.serde")
    api = pytest.importorskip("lmcache.v1.distributed.api")
    lmcache.register()
    memory = config.L1MemoryManagerConfig(size_in_bytes=16 << 20, use_lazy=False, shm_name="")
    manager = l1.L1Manager(config.L1ManagerConfig(memory))
    adapter = wrapper.SerdeL2AdapterWrapper(
        inner=files.FSL2Adapter(files.FSL2AdapterConfig(str(tmp_path))),
        serde=serde.create_serde_processor(serde.SerdeConfig("gaugekit", {})),
        l1_manager=manager,
    )
    tensor, key = cache(2, 3, 64, 32), api.ObjectKey(b"k" * 32, "model", 0)
    layout = api.MemoryLayoutDesc([tensor.shape], [tensor.dtype])
    reserved = manager.reserve_write(keys=[key], is_temporary=[False], layout_desc=layout, tag="test")
    held = reserved[key][1]
    held.tensor.copy_(tensor)

    def answer(query):
        for _ in range(1000):
            if result := query():
                return result
            time.sleep(0.01)
        raise TimeoutError

    def loaded() -> bool:
        held.tensor.zero_()
        task = adapter.submit_load_task([key], [held])
        return answer(lambda: adapter.query_load_result(task)).test(0)

    task = adapter.submit_store_task([key], [held])
    assert answer(adapter.pop_completed_store_tasks)[task].is_successful()
    (path,) = (path for path in tmp_path.iterdir() if path.is_file())
    assert path.stat().st_size == int(0.75 * tensor.nbytes) + 2048
    assert loaded() and torch.equal(held.tensor.view(torch.int16), tensor.view(torch.int16))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert not loaded()
    adapter.close()
