"""Whether adapters in fewer bits would make decoding faster: the products of slots alone.

    python tests/benchmarks/adapter_dtypes.py [--runs 40]

SmolLM2's slots at rank 16, 30 layers of them, one token: ``x A`` and ``(x A) B``, with A and B as
inputs, as they are in a bundle, so that no session can pack them beforehand. In float32 (MatMul),
in 8 bits with the input quantized on the way (DynamicQuantizeMatMul), and in 8 and 4 bits by blocks
of 16 (MatMulNBits). One thread; all take turns, with the caches emptied between them. The numbers
are random.
"""

import argparse
import statistics
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

CONTRIB_DOMAIN = "com.microsoft"
LAYERS = 30
# Inputs, rank, outputs: q, k and v share one A; so do gate and up.
SLOTS = [(576, 48, 960), (576, 32, 3072), (576, 16, 576), (1536, 16, 576)]
BLOCK = 16
NUMBERS = np.random.default_rng(0)
FLOAT, INT8, UINT8 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8


def in_float(inputs, outputs):
    return "MatMul", {}, [(FLOAT, NUMBERS.standard_normal((inputs, outputs), np.float32))]


def in_8_bits(inputs, outputs):
    matrix = NUMBERS.integers(-127, 128, (inputs, outputs), np.int8)
    return "DynamicQuantizeMatMul", {}, [(INT8, matrix), (FLOAT, scales(outputs))]


def by_blocks(bits):
    def make(inputs, outputs):
        shape = outputs, inputs // BLOCK, BLOCK * bits // 8
        matrix = NUMBERS.integers(0, 256, shape, np.uint8)
        said = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        return "MatMulNBits", said, [(UINT8, matrix), (FLOAT, scales(*shape[:2]))]

    return make


def scales(*shape):
    return np.full(shape, 0.01, np.float32)


KINDS = {
    "float32, MatMul": in_float,
    "8 bits, DynamicQuantizeMatMul": in_8_bits,
    "8 bits, MatMulNBits": by_blocks(8),
    "4 bits, MatMulNBits": by_blocks(4),
}


def bound_session(make):
    """Return a session over all slots, its inputs bound, and the bytes of A and B."""
    nodes, inputs, outputs, size = [], [], [], 0
    feeds = {}

    def given(name, kind, array):
        inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
        feeds[name] = array
        return name

    for number, (wide, rank, out) in enumerate(SLOTS * LAYERS):
        value = given(f"x{number}", FLOAT, NUMBERS.standard_normal((1, wide), np.float32))
        for matrix, shape in (("A", (wide, rank)), ("B", (rank, out))):
            operator, said, parts = make(*shape)
            size += sum(array.nbytes for _, array in parts)
            names = [given(f"{matrix}{number}.{place}", *part) for place, part in enumerate(parts)]
            domain = "" if operator == "MatMul" else CONTRIB_DOMAIN
            result = f"x{matrix}{number}"
            nodes.append(
                helper.make_node(operator, [value, *names], [result], domain=domain, **said)
            )
            value = result
        outputs.append(helper.make_tensor_value_info(value, FLOAT, [1, out]))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB_DOMAIN, 1)]
    graph = helper.make_graph(nodes, "slots", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for output in outputs:
        binding.bind_output(output.name)
    return session, binding, size


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    runs = parser.parse_args().runs
    made = {title: bound_session(make) for title, make in KINDS.items()}
    caches = np.zeros(60_000_000, np.int8)
    times = {title: [] for title in KINDS}
    for _ in range(runs + 2):
        for title, (session, binding, _) in made.items():
            caches += 1
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            times[title].append(time.perf_counter() - start)
    first = next(iter(KINDS))
    plain = statistics.median(times[first][2:])
    print(f"{'A and B as inputs':30} {'MB':>6} {'ms':>7} {'to float32':>11}")
    for title, (_, _, size) in made.items():
        found = statistics.median(times[title][2:])
        print(f"{title:30} {size / 1e6:6.1f} {1e3 * found:7.2f} {found / plain:11.2f}")


if __name__ == "__main__":
    main()
