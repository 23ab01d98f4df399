"""torch.export and ONNX of the eager backend, with a batch and a length that may change."""

import pytest
import torch
from torch.export import Dim

from tests.modeling_rebased.cases import make_ids, make_small_model


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def make_mask(ids):
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    return mask


# All kinds of layer and of position, in few layers: each of them takes seconds.
CASES = [
    ("every_type", {}, True),
    (
        "based",
        {
            "layer_types": ["conv", "linear_attention"],
            "num_hidden_layers": 2,
            "position_embedding_type": "learned",
            "max_position_embeddings": 300,
            "mlp_type": "none",
        },
        False,
    ),
]


@pytest.mark.parametrize(("name", "changes", "masked"), CASES)
def test_export_with_a_dynamic_batch_and_length(name, changes, masked):
    model, ids = make_small_model(name, **changes), make_ids()
    shape = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = {"input_ids": ids} | ({"attention_mask": make_mask(ids)} if masked else {})
    exported = torch.export.export(Logits(model), (), inputs, dynamic_shapes=dict.fromkeys(inputs, shape)).module()
    for batch, length in ((3, 1), (5, 40), (1, 300)):
        ids = torch.randint(1, 50, (batch, length))
        inputs = {"input_ids": ids} | ({"attention_mask": make_mask(ids)} if masked else {})
        kept = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        with torch.no_grad():
            actual, expected = exported(**inputs)[kept], model(**inputs).logits[kept]
        assert (actual - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(("name", "changes", "masked"), CASES)
def test_onnx_with_a_dynamic_batch_and_length(tmp_path, name, changes, masked):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, ids = make_small_model(name, **changes), make_ids()
    shape = {0: Dim("batch"), 1: Dim("length")}
    inputs = {"input_ids": ids} | ({"attention_mask": make_mask(ids)} if masked else {})
    shapes = dict.fromkeys(inputs, shape)
    torch.onnx.export(Logits(model), (), kwargs=inputs, dynamic_shapes=shapes, dynamo=True).save(tmp_path / "m.onnx")
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    for batch, length in ((3, 1), (5, 40), (1, 300)):
        ids = torch.randint(1, 50, (batch, length))
        inputs = {"input_ids": ids} | ({"attention_mask": make_mask(ids)} if masked else {})
        kept = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        actual = torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])[kept]
        expected = model(**inputs).logits[kept]
        assert (actual - expected).norm() / expected.norm() < 1e-5
