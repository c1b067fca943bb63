"""ONNX models become networks that compute the same, or are refused by node and operator."""

import sys

import numpy as np
import pytest
import torch

from lben.interop import ConversionError, from_onnx, from_torch, onnx_models

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

NUMBERS = np.random.default_rng(0)


def random(*shape, dtype=np.float32):
    return NUMBERS.standard_normal(shape).astype(dtype)


def make(nodes, shape, constants=None, *, batch="batch", opset=21, outputs=("y",)):
    """Return a model from x to y; a node is (operator, inputs, outputs, attributes)."""
    made = [
        helper.make_node(name, ins.split(), outs.split(), name=f"n{k}", **options)
        for k, (name, ins, outs, options) in enumerate(nodes)
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])
    y = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in outputs]
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(made, "graph", [x], y, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


IMAGES, VECTORS = (3, 7, 8), (6,)
INTEGERS = {"axes": np.array([2, 3]), "last": np.array([-1])}
ONE = [
    ("Gemm", VECTORS, {"W": random(6, 4), "b": random(4)}, {}),
    ("Gemm", VECTORS, {"W": random(4, 6), "b": random(1, 4)}, {"transB": 1}),
    ("Gemm", VECTORS, {"W": random(6, 4), "b": random(4)}, {"alpha": 0.3, "beta": 2.5}),
    ("Gemm", VECTORS, {"W": random(6, 4)}, {"alpha": 0.3}),
    ("MatMul", VECTORS, {"W": random(6, 4)}, {}),
    ("MatMul", (2, 6), {"W": random(6, 4)}, {}),
    ("Add", VECTORS, {"b": random(6)}, {}),
    ("Add", IMAGES, {"b": random(3, 1, 1)}, {}),
    ("Sub", VECTORS, {"b": random(1, 6)}, {}),
    ("Mul", IMAGES, {"b": random(8)}, {}),
    ("Div", VECTORS, {"b": np.float32(3)}, {}),
    ("Conv", IMAGES, {"W": random(4, 3, 3, 3), "b": random(4)}, {"pads": [1, 0, 2, 1]}),
    ("Conv", IMAGES, {"W": random(6, 1, 3, 2)},
     {"group": 3, "strides": [2, 1], "dilations": [1, 2]}),
    ("Conv", IMAGES, {"W": random(2, 3, 3, 4)}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", IMAGES, {"W": random(2, 3, 2, 3)}, {"auto_pad": "SAME_LOWER"}),
    ("Conv", IMAGES, {"W": random(2, 3, 2, 3)}, {"auto_pad": "VALID"}),
    ("Conv", (2, 9), {"W": random(3, 2, 3)}, {"pads": [1, 1]}),
    ("ConvTranspose", (3, 4, 4), {"W": random(3, 2, 3, 3), "b": random(2)},
     {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    ("BatchNormalization", IMAGES,
     {"s": random(3), "b": random(3), "m": random(3), "v": np.abs(random(3)) + 0.5}, {}),
    ("AveragePool", IMAGES, {}, {"kernel_shape": [3, 2], "strides": [2, 2]}),
    ("AveragePool", IMAGES, {}, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", IMAGES, {},
     {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("GlobalAveragePool", IMAGES, {}, {}),
    ("GlobalMaxPool", IMAGES, {}, {}),
    ("MaxPool", IMAGES, {}, {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ("MaxPool", IMAGES, {}, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("ReduceMean", IMAGES, {"axes": np.array([2, 3])}, {"keepdims": 0}),
    ("ReduceSum", IMAGES, {"axes": np.array([1])}, {}),
    ("Flatten", IMAGES, {}, {}),
    ("Reshape", IMAGES, {"s": np.array([0, -1])}, {}),
    ("Transpose", IMAGES, {}, {"perm": [0, 3, 1, 2]}),
    ("Unsqueeze", VECTORS, {"a": np.array([1])}, {}),
    ("Squeeze", (1, 6), {"a": np.array([1])}, {}),
    ("Slice", IMAGES, {"s": np.array([1]), "e": np.array([6]), "a": np.array([2])}, {}),
    ("Gather", VECTORS, {"i": np.array([5, 0, 0])}, {"axis": 1}),
    ("Pad", IMAGES, {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1])}, {}),
    ("Pad", IMAGES, {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1])}, {"mode": "reflect"}),
    ("DepthToSpace", (4, 2, 2), {}, {"blocksize": 2}),
    ("Expand", (1, 4), {"s": np.array([1, 3, 4])}, {}),
    ("PRelu", IMAGES, {"s": random(3, 1, 1)}, {}),
    ("PRelu", VECTORS, {"s": random(1)}, {}),
    ("Clip", VECTORS, {"a": np.float32(-0.5), "b": np.float32(1)}, {}),
    ("Clip", VECTORS, {"a": np.float32(0.25)}, {}),
    ("Max", VECTORS, {"a": random(6)}, {}),
    ("Min", VECTORS, {"a": random(6)}, {}),
    ("Sum", VECTORS, {"a": random(6), "b": random(6)}, {}),
    ("HardSigmoid", VECTORS, {}, {}),
    ("LeakyRelu", VECTORS, {}, {"alpha": 0.2}),
    ("Elu", VECTORS, {}, {"alpha": 0.5}),
    ("Celu", VECTORS, {}, {"alpha": 0.5}),
    ("Gelu", VECTORS, {}, {"approximate": "tanh"}),
    *[(name, VECTORS, {}, {}) for name in (
        "Relu", "LeakyRelu", "Tanh", "Sigmoid", "Softplus", "Elu", "Selu", "Celu", "Gelu",
        "HardSwish", "Softsign", "Abs", "Neg", "Mish", "Identity", "Dropout",
    )],
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "constants", "options"), ONE, ids=lambda v: str(v)[:30])
@pytest.mark.parametrize("batch", ["batch", 1])
def test_a_network_computes_what_its_operator_computes(name, shape, constants, options, batch):
    inputs = " ".join(["x", *constants])
    model = make([(name, inputs, "y", options)], shape, constants, batch=batch)
    network = from_onnx(model)  # compares the outputs itself
    x = random(2, *shape)
    expected = np.concatenate([
        onnx.reference.ReferenceEvaluator(model).run(None, {"x": part})[0].reshape(1, -1)
        for part in np.split(x, 2)
    ])  # fmt: skip
    np.testing.assert_allclose(
        network.evaluate(x.astype(np.float64)), expected, atol=1e-4, rtol=1e-4
    )


def residual(opset=21):
    """Return a residual network of images whose reshape reads the batch from the input."""
    return make(
        [
            ("Constant", "", "c", {"value": numpy_helper.from_array(random(2, 2, 3, 3))}),
            ("Conv", "x k b", "a", {"pads": [1, 1, 1, 1]}),
            ("Relu", "a", "r", {}),
            ("Conv", "r c", "s", {"pads": [1, 1, 1, 1]}),
            ("Add", "s x", "t", {}),
            ("Sigmoid", "t", "u", {}),
            ("Mul", "t u", "v", {}),
            ("Concat", "v r", "w", {"axis": 1}),
            ("Shape", "x", "n", {}),
            ("Gather", "n zero", "m", {}),
            ("Unsqueeze", "m zeros", "o", {}),
            ("Concat", "o minus", "p", {"axis": 0}),
            ("Reshape", "w p", "q", {}),
            ("Transpose", "M", "N", {}),
            ("MatMul", "q N", "y", {}),
        ],
        (2, 4, 4),
        {
            "k": random(2, 2, 3, 3), "b": random(2), "M": random(5, 64), "zero": np.array(0),
            "zeros": np.array([0]), "minus": np.array([-1]),
        },
        opset=opset,
    )  # fmt: skip


def test_files_and_bytes_are_read(tmp_path):
    model = residual()
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    network = from_onnx(path)
    assert [b.activation.name for b in network.blocks] == ["ReLU", "SiLU"]
    assert network.output.exact
    for source in (str(path), path.read_bytes(), model):
        assert from_onnx(source).fingerprint == network.fingerprint


def test_it_is_the_network_of_the_module_that_was_exported():
    module = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 4)
    ).eval()
    constants = {k.replace(".", "_"): v.numpy() for k, v in module.state_dict().items()}
    model = make(
        [
            ("Conv", "x 0_weight 0_bias", "a", {}),
            ("Relu", "a", "r", {}),
            ("Flatten", "r", "f", {}),
            ("Gemm", "f 3_weight 3_bias", "y", {"transB": 1}),
        ],
        (2, 4, 4), constants,
    )  # fmt: skip
    assert from_onnx(model).fingerprint == from_torch(module, (2, 4, 4)).fingerprint


def test_older_operators_have_their_limits_as_attributes():
    model = make([("Clip", "x", "y", {"min": -1.0, "max": 2.0})], VECTORS, opset=9)
    assert from_onnx(model).blocks[0].activation.name == "Hardtanh(-1.0, 2.0)"


def test_second_outputs_that_nothing_reads_do_no_harm():
    model = make([("Dropout", "x", "d mask", {}), ("Relu", "d", "y", {})], VECTORS)
    assert from_onnx(model).units == 6


def test_open_sizes_are_asked_for():
    model = make([("Relu", "x", "y", {})], (3, "h", "w"))
    with pytest.raises(ConversionError, match="leaves sizes of its input open"):
        from_onnx(model)
    assert from_onnx(model, (3, 2, 2)).input_shape == (3, 2, 2)
    for shape in ((4, 2, 2), (3, 2), (3, 0, 2)):
        with pytest.raises(ConversionError, match="does not fit the input"):
            from_onnx(model, shape)


REFUSED = [
    ([("Softmax", "x", "y", {})], VECTORS, {}, "Softmax, node n0, cannot.*certify the logits"),
    ([("LayerNormalization", "x s", "y", {})], VECTORS, {"s": random(6)}, "batch normalisation"),
    ([("Erf", "x", "y", {})], VECTORS, {}, "export with opset 20"),
    ([("Sin", "x", "y", {})], VECTORS, {}, "Sin, node n0.*not known to lben"),
    ([("Mul", "x x", "y", {})], VECTORS, {}, "Mul, node n0.*both factors"),
    ([("MatMul", "x x", "y", {})], (2, 2), {}, "MatMul.*one factor must be a constant matrix"),
    ([("Div", "a x", "y", {})], VECTORS, {"a": random(6)}, "divisor is a constant"),
    ([("Gemm", "x W", "y", {})], VECTORS, {"W": random(5, 4)}, "Gemm.*takes 5 features"),
    ([("Conv", "x W", "y", {})], IMAGES, {"W": random(2, 4, 3, 3)}, "Conv.*takes 4 channels"),
    ([("Reshape", "x s", "y", {})], (6, 2), {"s": np.array([-1, 6])}, "mixes samples"),
    ([("ReduceMean", "x", "y", {})], VECTORS, {}, "reduces the batch"),
    ([("Pad", "x p v", "y", {})], VECTORS, {"p": np.array([0, 1, 0, 1]), "v": np.float32(2)},
     "pads with a number other than 0"),
    ([("Exp", "W", "e", {}), ("MatMul", "x e", "y", {})], VECTORS, {"W": random(6, 2)},
     "Exp, node n0.*fold constants"),
    ([("Gemm", "x W", "y", {})], VECTORS, {"W": random(6, 2, dtype=np.float16)}, "W is float16"),
    ([("Gemm", "x W", "y", {})], VECTORS, {"W": np.full((6, 2), np.nan, dtype=np.float32)},
     "W contains NaN or Inf"),
    ([("Identity", "W", "y", {})], VECTORS, {"W": random(6, 2)}, "does not depend on its input"),
    ([("Dropout", "x r t", "y", {})], VECTORS, {"r": np.float32(0.5), "t": np.array(True)},
     "drops numbers at random"),
    ([("MaxPool", "x", "w z", {"kernel_shape": [2, 2]}), ("Cast", "z", "y", {"to": 1})], IMAGES, {},
     "Cast, node n1.*reads z, a second output"),
    ([("Relu", "x", "y", {})], (), {}, "batch as its first dimension"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "shape", "constants", "message"), REFUSED, ids=lambda v: str(v)[:40]
)
def test_what_cannot_be_converted_is_refused_by_name(nodes, shape, constants, message):
    with pytest.raises(ConversionError, match=r"(?s)" + message):
        from_onnx(make(nodes, shape, constants))


def test_models_of_several_outputs_are_refused():
    model = make([("Relu", "x", "y", {}), ("Abs", "x", "z", {})], VECTORS, outputs=("y", "z"))
    with pytest.raises(ConversionError, match="one input and one output, the model has 1 and 2"):
        from_onnx(model)


@pytest.mark.parametrize("end", [0, 1, 40, -30, -200])
def test_truncated_files_are_refused(tmp_path, end):
    whole = residual().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(whole[:end])
    for source in (path, whole[:end]):
        with pytest.raises(ConversionError, match="no complete ONNX model"):
            from_onnx(source)


def test_files_of_another_format_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ConversionError, match="no complete ONNX model"):
        from_onnx(path)
    with pytest.raises(FileNotFoundError):
        from_onnx(tmp_path / "other.onnx")


def test_a_fault_of_the_reader_is_found(monkeypatch):
    def transposed(x, weight, bias=None, **options):
        return onnx_models._convolve(x, np.swapaxes(weight, 2, 3), bias, **options)

    operators = {**onnx_models._OPERATORS, "Conv": transposed}
    monkeypatch.setattr(onnx_models, "_OPERATORS", operators)
    with pytest.raises(ConversionError, match="computes something else"):
        from_onnx(residual())
    assert from_onnx(residual(), check=False).out_features == 5


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'lben\[onnx\]'"):
        from_onnx(b"")
