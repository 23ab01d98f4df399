"""Masks, positions, packed sequences and keywords: each batch is right, or refused with the name of what is wrong.

Expectations are lone rows or lone sequences, run by themselves without a mask, positions or a cache.
"""

import inspect
import itertools
import re

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache
from transformers.utils import TransformersKwargs

from modeling_rebased import (
    ReBasedForCausalLM,
    ReBasedForQuestionAnswering,
    ReBasedForSequenceClassification,
    ReBasedForTokenClassification,
    ReBasedModel,
)
from modeling_rebased.cache_rebased import CACHE_NAME, TokenCountLayer, make_croppable
from modeling_rebased.modeling_rebased import ReBasedRMSNorm
from tests.modeling_rebased.cases import MODELS, RECURRENT, make_config, make_ids, make_model, make_small_model


LENGTHS = (7, 1, 12, 3)
LENGTH = 23
HEADS = [
    ReBasedForCausalLM,
    ReBasedForQuestionAnswering,
    ReBasedForSequenceClassification,
    ReBasedForTokenClassification,
    ReBasedModel,
]
OPTIONS = ("return_position_ids", "return_flash_attn_kwargs", "return_seq_idx")


def assert_same(actual, expected):
    """A relative Frobenius error: where (q.k)**2 is near zero single elements are less exact."""
    assert actual.shape == expected.shape
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-5


def make_rows():
    return [make_ids(1, length + i)[:, i:] for i, length in enumerate(LENGTHS)]


def lone(model, rows):
    return torch.cat([model(row, use_cache=False).logits[0] for row in rows])


def flatten(rows, **options):
    features = [{"input_ids": row[0].tolist()} for row in rows]
    collator = DataCollatorWithFlattening(return_tensors="pt", **{k: v for k, v in options.items() if k in KNOWN})
    batch = collator(features)
    batch.pop("labels")
    if not options["return_position_ids"]:
        batch.pop("position_ids", None)
    return batch


KNOWN = inspect.signature(DataCollatorWithFlattening.__init__).parameters


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chosen", [x for x in itertools.product([0, 1], repeat=3) if any(x)], ids=str)
def test_what_the_collator_packs(name, chosen):
    model, rows = make_model(name), make_rows()
    batch = flatten(rows, **dict(zip(OPTIONS, map(bool, chosen))))
    assert_same(model(**batch).logits[0], lone(model, rows))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        *(("paper", chosen) for chosen in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))),
        *(("every_type", chosen) for chosen in ((1, 0, 0), (0, 1, 0))),  # with bounds, and without
        *(("mqar", chosen) for chosen in ((0, 1, 0), (0, 0, 1))),  # learned positions that nobody gives
        ("based", (0, 0, 1)),
        ("softmax", (1, 1, 1)),
    ],
    ids=str,
)
def test_what_the_collator_packs_compiled(name, chosen):
    """Also without `use_cache=False`: the configuration asks for a cache by default."""
    model, rows = make_small_model(name), make_rows()
    batch = flatten(rows, **dict(zip(OPTIONS, map(bool, chosen))))
    assert_same(compiled(model)(**batch).logits[0], lone(model, rows))


@pytest.mark.parametrize("model_class", [ReBasedModel, ReBasedForTokenClassification])
def test_compiled_packing_of_other_heads(model_class):
    torch.manual_seed(0)
    config = make_config("every_type", num_hidden_layers=2, layer_types=["linear_attention", "sliding_attention"])
    model, rows = model_class(config).eval(), make_rows()
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    ids = torch.cat(rows, dim=1)
    labels = {} if model_class is ReBasedModel else {"labels": ids % 2}
    packed = compiled(model)(ids, position_ids=positions, **labels)
    parts = [model(row, use_cache=False) for row in rows]
    name = "last_hidden_state" if model_class is ReBasedModel else "logits"
    assert_same(packed[name][0], torch.cat([part[name][0] for part in parts]))


COMPILED_WITH_A_MASK = [("paper", "position_ids"), ("paper", "cu_seq_lens_q"), ("paper", "seq_idx")]
COMPILED_WITH_A_MASK += [("every_type", "position_ids")]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_packing_with_a_mask(name, compile_it, given):
    """A mask of ones changes nothing, and padding before, inside or after packed sequences is passed over."""
    if compile_it and (name, given) not in COMPILED_WITH_A_MASK:
        pytest.skip("compiled: each kind of bound and each kind of layer once")
    model, rows = (make_small_model if compile_it else make_model)(name), make_rows()
    run = compiled(model) if compile_it else model

    def options(sizes, positions):
        if given == "position_ids":
            return {given: torch.tensor(positions)[None]}
        if given == "cu_seq_lens_q":
            return {given: torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)}
        return {given: torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]}

    def check_without_padding(rows):
        ids, sizes = torch.cat(rows, dim=1), [row.shape[1] for row in rows]
        positions = [place for size in sizes for place in range(size)]
        out = run(ids, attention_mask=torch.ones_like(ids), **options(sizes, positions))
        assert_same(out.logits[0], lone(model, rows))

    # Two columns of padding inside the first sequence, one before the last, and one after each other.
    padded, mask, places = [], [], []
    for i, row in enumerate(rows):
        cut = {0: 3, 3: 0}.get(i, row.shape[1])
        padding = 2 if i == 0 else 1
        padded.append(torch.cat([row[:, :cut], torch.zeros(1, padding, dtype=torch.long), row[:, cut:]], dim=1))
        mask += [1] * cut + [0] * padding + [1] * (row.shape[1] - cut)
        places += [*range(cut), *[0] * padding, *range(cut, row.shape[1])]
    check_without_padding(padded)  # as tokens
    if not compile_it or (name == "paper" and given != "seq_idx"):  # tracing for another length takes long
        check_without_padding(rows)

    ids, mask, sizes = torch.cat(padded, dim=1), torch.tensor(mask)[None], [row.shape[1] for row in padded]
    packed = run(ids, attention_mask=mask, **options(sizes, places)).logits[0, mask[0] == 1]
    expected = lone(model, rows)
    if name in ("every_type", "softmax_first", "based", "hybrid"):
        # Softmax windows count columns, so padding inside a sequence takes room in them: compare with a plain row.
        expected = []
        for start, size in zip([0, *itertools.accumulate(sizes)], sizes):
            part, kept = ids[:, start : start + size], mask[:, start : start + size]
            expected.append(model(part, attention_mask=kept, use_cache=False).logits[0, kept[0] == 1])
        expected = torch.cat(expected)
    assert_same(packed, expected)


def refused(message, error=ValueError):
    """The whole message, word by word."""
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def test_packing_that_does_not_fit_is_refused():
    model, ids = make_model("paper"), make_ids()
    one = ids[:1]
    bounds = torch.tensor([0, 10, 23], dtype=torch.int32)
    numbers = (torch.arange(23) >= 10).long()[None]
    restarting = torch.tensor([[*range(10), *range(13)]])
    with refused("`cu_seq_lens_q` packs sequences into a batch of 1, but the batch is 2."):
        model(ids, cu_seq_lens_q=bounds)
    for wrong in ([0, 10, 22], [1, 10, 23], [0, 12, 10, 23]):
        with refused(f"`cu_seq_lens_q` must rise from 0 to the number of tokens, 23, but it is {wrong}."):
            model(one, cu_seq_lens_q=torch.tensor(wrong))
    with refused("`cu_seq_lens_q` and `seq_idx` set different bounds between packed sequences."):
        model(one, cu_seq_lens_q=bounds, seq_idx=(torch.arange(23) >= 11).long()[None])
    for wrong in (numbers[0], numbers[:, :9], numbers.expand(2, -1)):
        with refused(f"`seq_idx` must be [batch, tokens] = (1, 23), but it is {tuple(wrong.shape)}."):
            model(one, seq_idx=wrong)
    for given in ({"seq_idx": numbers.expand(2, -1)}, {"position_ids": restarting}):
        with refused(
            f"`{next(iter(given))}` restart within a row, which packs sequences: that takes a batch of 1, but the "
            "batch is 2."
        ):
            model(ids, **given)
    with pytest.raises(ValueError, match="`cu_seq_lens_k` needs `cu_seq_lens_q`"):
        model(one, cu_seq_lens_k=bounds)
    for given in ({"cu_seq_lens_q": bounds}, {"seq_idx": numbers}, {"position_ids": restarting}):
        with pytest.raises(ValueError, match=rf"Packed sequences \(`{next(iter(given))}`\) cannot continue"):
            model(one, **given, past_key_values=DynamicCache(config=model.config))


@torch.no_grad()
def test_masks_that_do_not_fit_are_refused():
    model, ids = make_model("every_type"), make_ids()
    for wrong in (torch.ones(2, 22), torch.ones(1, 23), torch.ones(2, 1, 1, 23)):
        with refused(
            "`attention_mask` must be [batch, tokens], as long as the cached and the new tokens together, but its "
            f"shape is {tuple(wrong.shape)} for 23 new tokens in a batch of 2."
        ):
            model(ids, attention_mask=wrong)
    cache = DynamicCache(config=model.config)
    mask = torch.ones(2, 10)
    mask[1, 7:] = 0
    model(ids[:, :10], attention_mask=mask, past_key_values=cache)
    for columns, new in ((11, 3), (3, 3)):
        with refused(
            f"`attention_mask` has {columns} columns, but `{CACHE_NAME}` holds 10 and {new} more are given. It must "
            "have one column for each of them."
        ):
            model(ids[:, :new], attention_mask=torch.ones(2, columns), past_key_values=cache)
    for new in (1, 3):
        with refused(
            "`attention_mask` has 10 tokens that are not padding among the 10 cached columns of row 1, but "
            f"`{CACHE_NAME}` has taken in 7. A recurrent state cannot forget a token: where `generate` has filled up "
            "a row that ended early, feed the conversation to an empty cache again."
        ):
            model(ids[:, :new], attention_mask=torch.ones(2, 10 + new), past_key_values=cache)


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused():
    model, ids = make_model("every_type"), make_ids()
    with refused(
        f"`{CACHE_NAME}` must be a `Cache`, such as `DynamicCache(config=model.config)`, but it is a tuple.", TypeError
    ):
        model(ids, past_key_values=((ids, ids),))
    with refused(
        f"`{CACHE_NAME}` has no recurrent state for layer 0, which is 'conv': it holds NoneType. Make it as "
        "`DynamicCache(config=model.config)` or `StaticCache(config=model.config, max_cache_len=...)`."
    ):
        model(ids, past_key_values=DynamicCache())
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with refused(
        f"`{CACHE_NAME}` holds 2 rows, but the batch has 1. Only a cache of one row is copied for every row of a "
        "batch."
    ):
        model(ids[:1], past_key_values=cache)
    with refused(
        "This cache cannot record its past and be cropped, since its recurrent states cannot forget. Leave it to "
        "`generate` to make the cache of assisted generation.",
        NotImplementedError,
    ):
        cache.layers[-1].crop(-1)
    small, longer = make_model("paper", num_hidden_layers=2), make_model("paper")
    used = DynamicCache(config=longer.config)
    longer(ids, past_key_values=used)
    for cache in (used, DynamicCache(config=longer.config)):
        with refused(
            f"`{CACHE_NAME}` was made for a model of more layers: this one has 2, and the next layer of the cache is "
            "a LinearAttentionLayer. Make it as `DynamicCache(config=model.config)`."
        ):
            small(ids, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_rows(name, side):
    """Positions that `generate` or a tokenizer's user makes beside a mask do not look like packed sequences."""
    model, ids = make_model(name), make_ids()
    real = slice(8, None) if side == "left" else slice(None, 15)
    mask = torch.zeros_like(ids)
    mask[0] = 1
    mask[1, real] = 1
    for filler in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
        out = model(ids, attention_mask=mask, position_ids=positions).logits
        assert_same(out[0], lone(model, [ids[:1]]))
        assert_same(out[1, real], lone(model, [ids[1:, real]]))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_mask_longer_than_the_tokens(name):
    """Its beginning counts, as in Llama: a mask may be as long as a static cache."""
    model, ids = make_model(name), make_ids()
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 9, dtype=torch.long)], dim=1)
    mask[1, :8] = 0
    expected = lone(model, [ids[1:, 8:]])
    assert_same(model(ids, attention_mask=mask, use_cache=False).logits[1, 8:], expected)
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :15], attention_mask=mask, past_key_values=cache).logits
    rest = model(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits
    assert_same(torch.cat([first, rest], dim=1)[1, 8:], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("static", [False, True])
def test_a_mask_of_the_new_tokens_only(name, static):
    """Positions go on from what the cache holds, and softmax layers see the cached columns."""
    model, ids = make_model(name), make_ids()
    cache = DynamicCache(config=model.config)
    if static:
        cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids[:, :10], past_key_values=cache)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    out = model(ids[:, 10:18], attention_mask=mask, past_key_values=cache).logits
    assert_same(out[0], lone(model, [ids[:1]])[10:18])
    assert_same(out[1, :6], lone(model, [ids[1:]])[10:16])
    # The length of the cache is counted in columns, padding included.
    assert cache.get_seq_length() == 18
    if not set(model.config.layer_types) - {"conv", "linear_attention"}:
        last = model(ids[:, 16:], attention_mask=torch.ones(2, 7), past_key_values=cache).logits
        assert_same(last[1], lone(model, [ids[1:]])[16:])
    else:
        with pytest.raises(ValueError, match="`attention_mask` has 5 columns"):
            model(ids[:, 18:], attention_mask=torch.ones(2, 5), past_key_values=cache)


@torch.no_grad()
def test_the_length_of_a_cache_is_counted_in_columns():
    """Padding included, on the host as in the tensor that compiled steps change."""
    model, ids = make_model("paper"), make_ids()
    cache = DynamicCache(config=model.config)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    mask[1, :9] = 0
    model(ids, attention_mask=mask, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    counter = cache.layers[-1]
    assert cache.get_seq_length() == 24
    counter.columns = None
    assert cache.get_seq_length() == 24
    assert counter.counts.tolist() == [[20, 24], [15, 24]]


@torch.no_grad()
@pytest.mark.parametrize("name", RECURRENT)
def test_a_turn_after_rows_that_ended_early(name):
    """`generate` fills up a finished row with padding, which a recurrent state cannot forget."""
    model, ids = make_model(name), make_ids()
    first = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    cache = first.get("cache", first.get("past_key_values"))
    mask = torch.ones_like(first.sequences)
    mask[1, 26:] = 0
    turn = torch.cat([mask[:, :-1], torch.ones(2, 4, dtype=torch.long)], dim=1)
    with pytest.raises(ValueError, match="not padding among the 28 cached columns of row 1"):
        model(ids[:, :4], attention_mask=turn, past_key_values=cache)
    for mask in (turn, torch.ones_like(turn)):
        kept = DynamicCache(config=model.config)
        together = torch.cat([first.sequences[:, :-1], ids[:, :4]], dim=1)
        model(together[:, :28], attention_mask=mask[:, :28], past_key_values=kept)
        out = model(together[:, 28:], attention_mask=mask, past_key_values=kept).logits
        if name in ("paper", "mqar", "pure", "conv"):
            assert_same(out[1], lone(model, [together[1:][mask[1:] == 1][None]])[-4:])


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", RECURRENT)
def test_a_turn_of_one_token_on_a_gpu(name):
    """Where the host does not read the mask of a decoding step: both backends go on after padding as lone rows do."""
    ids, lengths = make_ids(length=24).cuda(), (23, 18)
    mask = torch.stack([torch.arange(23) < length for length in lengths]).long().cuda()
    turn = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    logits = []
    for backend in ("eager", "triton"):
        model = make_model(name, kernel_backend=backend).cuda()
        cache = DynamicCache(config=model.config)
        model(ids[:, :23], attention_mask=mask, past_key_values=cache)
        logits.append(model(ids[:, 23:], attention_mask=turn, past_key_values=cache).logits[:, 0])
        for row, length in enumerate(lengths):
            if length < 23 and set(model.config.layer_types) - {"conv", "linear_attention"}:
                continue  # padding takes room in softmax windows
            alone = torch.cat([ids[row : row + 1, :length], ids[row : row + 1, 23:]], dim=1)
            torch.testing.assert_close(logits[-1][row], model(alone).logits[0, -1], rtol=1e-4, atol=1e-4)

        first = model.generate(
            ids[:, :23], max_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=0
        )
        cache = first.get("cache", first.get("past_key_values"))
        ended = torch.ones_like(first.sequences)
        ended[1, 26:-1] = 0
        with pytest.raises(ValueError, match="not padding among the 28 cached columns of row 1"):
            model.generate(first.sequences, attention_mask=ended, past_key_values=cache, max_new_tokens=2)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_masks_and_positions_of_wrong_shapes_are_refused():
    for name in ("paper", "every_type", "softmax"):
        model, ids = make_model(name), make_ids()
        for shape in ((1, 23), (3, 23), (2, 22)):
            with pytest.raises(ValueError, match=r"`attention_mask` must be \[batch, tokens\]"):
                model(ids, attention_mask=torch.ones(shape))
        for shape in ((3, 23), (2, 22), (23,), (1, 1, 23)):
            with pytest.raises(ValueError, match=r"`position_ids` must be \[batch, tokens\]"):
                model(ids, position_ids=torch.ones(shape, dtype=torch.long))
        with pytest.raises(ValueError, match="at least one token per row"):
            model(ids[:, :0])
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="`attention_mask` has 2 columns"):
        model(ids[:, :2], attention_mask=torch.ones(2, 2), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("static", [False, True])
def test_a_prefix_cached_in_inference_mode(name, static):
    model, ids = make_model(name), make_ids()
    if static and name in ("softmax", "every_type", "softmax_first", "based", "hybrid"):
        pytest.skip("the library's own static layers change inference tensors in place")
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=cache)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(out, model.generate(ids, use_cache=False, max_new_tokens=4, do_sample=False, pad_token_id=0))


@torch.no_grad()
@pytest.mark.parametrize("name", RECURRENT)
def test_one_row_of_cache_for_many_rows(name):
    """For several beams or samples that continue one prompt."""
    model, ids = make_model(name), make_ids(1)
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))
    with pytest.raises(ValueError, match="holds 3 rows, but the batch has 2"):
        model(make_ids(2, 1), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_one_row_of_cache_for_two_rows_of_one_token(name, cache_class):
    model, ids = make_model(name), make_ids(2)
    prefix = ids[:1, :20]
    options = {} if cache_class is DynamicCache else {"max_cache_len": 32}
    cache = cache_class(config=model.config, **options)
    model(prefix, past_key_values=cache)
    steps = [model(ids[:, column : column + 1], past_key_values=cache).logits for column in (20, 21, 22)]
    for row in range(2):
        alone = torch.cat([prefix, ids[row : row + 1, 20:]], dim=1)
        assert_same(torch.cat(steps, dim=1)[row], model(alone, use_cache=False).logits[0, 20:])


def test_what_cannot_be_is_refused_clearly():
    model, ids = make_model("paper"), make_ids()
    with pytest.raises(TypeError, match=r"must be a `Cache`.*tuple"):
        model(ids, past_key_values=((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(NotImplementedError, match=r"Use `torch.export.export` instead"):
        torch.jit.trace(model, ids, strict=False)
    with pytest.raises(ValueError, match="`is_causal=False` is not possible"):
        model(ids, is_causal=False)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="cannot record its past"):
        cache.activate_past_recording()
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot be used in training with gradient checkpointing"):
        model(ids, past_key_values=cache, labels=ids)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 9])
def test_training_goes_on_from_a_cache(name, length):
    """The output layer's gradient depends on the last hidden states only, so a fixed prefix leaves it as it is."""
    model, ids = make_model(name, tie_word_embeddings=False).double(), make_ids()

    def gradient(logits):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, -length:].flatten(0, 1), ids[:, -length:].flatten()).backward()
        return model.lm_head.weight.grad.clone()

    expected = gradient(model(ids, use_cache=False).logits)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-length], past_key_values=cache)
    assert_same(gradient(model(ids[:, -length:], past_key_values=cache).logits), expected)
    assert model.model.layers[0].input_layernorm.weight.grad.norm() > 0


@pytest.mark.parametrize("model_class", HEADS)
def test_no_keyword_is_swallowed(model_class):
    model, ids = model_class(make_config("paper", pad_token_id=0)).eval(), make_ids()
    for given in (
        {"attention_masks": torch.ones_like(ids)},
        {"past_key_value": DynamicCache(config=model.config)},
        {"cache_params": DynamicCache(config=model.config)},
        {"nonsense": 1},
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(given))}'"):
            model(ids, **given)
    harmless = dict.fromkeys(TransformersKwargs.__annotations__)
    harmless |= {"output_hidden_states": True, "num_items_in_batch": torch.tensor(3), "output_router_logits": False}
    assert model(ids, **harmless, return_dict=True).hidden_states is not None


def test_compiled_models_refuse_keywords_too():
    model = compiled(make_small_model("paper"))
    with pytest.raises(Exception, match="attention_masks"):
        model(make_ids(), attention_masks=torch.ones(2, 23))
    assert model(make_ids(), output_hidden_states=False).logits.shape == (2, 23, 50)


@torch.no_grad()
def test_an_unconfigured_cache_serves_softmax_layers():
    model, ids = make_model("softmax"), make_ids()
    cache = DynamicCache()
    outputs = [model(part, past_key_values=cache).logits for part in ids.split([10, 12, 1], dim=1)]
    assert_same(torch.cat(outputs, dim=1), model(ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("position_embedding_type", ["rope", "learned"])
def test_a_ready_mask_of_a_softmax_model(position_embedding_type):
    """A tree: two tokens follow the same five. The mask keeps them apart, and their positions are the same."""
    model, ids = make_model("softmax", position_embedding_type=position_embedding_type), make_ids(1, 7)
    causal = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    assert_same(model(ids, attention_mask=causal).logits, model(ids).logits)
    branches, positions = causal.clone(), torch.tensor([[0, 1, 2, 3, 4, 5, 5]])
    branches[..., 6, 5] = False
    logits = model(ids, attention_mask=branches, position_ids=positions).logits
    assert_same(logits[:, -1], model(ids[:, [0, 1, 2, 3, 4, 6]]).logits[:, -1])
    cache = DynamicCache(config=model.config)
    parts = [
        model(part, attention_mask=branches[:, :, rows, : rows.stop], position_ids=positions[:, rows], cache=cache)
        for part, rows in zip(ids.split([4, 3], dim=1), (slice(0, 4), slice(4, 7)))
    ]
    assert_same(torch.cat([part.logits for part in parts], dim=1), logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "softmax"])
def test_missing_attention_weights_are_told(name, monkeypatch):
    from modeling_rebased import modeling_rebased

    told = []
    monkeypatch.setattr(modeling_rebased.logger, "warning_once", told.append)
    model = make_model(name, attn_implementation="sdpa")
    model(make_ids())
    assert not told
    model(make_ids(), output_attentions=True)
    assert len(told) == 1 and "`output_attentions=True`" in told[0]
    model = make_model(name, attn_implementation="eager")
    model(make_ids(), output_attentions=True)
    assert len(told) == (2 if name == "paper" else 1)


def test_the_epsilon_of_rmsnorm():
    norm = ReBasedRMSNorm(4, eps=0.25)
    torch.testing.assert_close(norm(torch.full((1, 4), 0.5)), torch.full((1, 4), 0.5 / 0.5**0.5))
    assert torch.equal(norm(torch.zeros(1, 4)), torch.zeros(1, 4))


@pytest.mark.parametrize("name", ["paper", "mqar", "every_type", "softmax"])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompt_tuning_generates(name, kind):
    """Virtual tokens before the prompt: they are in the cache and in the mask, but not in the ids."""
    import peft

    model, ids = make_model(name), make_ids()
    options = {"encoder_hidden_size": 16} if kind == "PromptEncoderConfig" else {}
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **options))
    tuned(input_ids=ids, labels=ids).loss.backward()
    tuned.eval()
    with torch.no_grad():
        out = tuned.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        for _ in range(5):
            ids = torch.cat([ids, tuned(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


@torch.no_grad()
def test_prefix_tuning_of_a_softmax_model_generates():
    """PEFT puts a cache of its own in the place of the one that `generate` made."""
    from peft import PrefixTuningConfig, get_peft_model

    model, ids = make_model("softmax"), make_ids()
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 3)
    out = tuned.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for _ in range(5):
        ids = torch.cat([ids, tuned(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids) and not torch.equal(out, plain)


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_on_the_meta_device(name):
    """As programs do that count operations or memory before there are weights."""
    with torch.device("meta"):
        model, ids = ReBasedForCausalLM(make_config(name)).train(), make_ids()
    output = model(ids.to("meta"), labels=ids.to("meta"))
    output.loss.backward()
    assert output.logits.shape == (2, LENGTH, 50)
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_decoding_step_never_waits_for_the_device(name, masked):
    """Tensors on the meta device have no values, so reading one on the host fails."""
    if masked and "full_attention" in make_config(name).layer_types:
        pytest.skip("the library itself asks whether a mask for full attention has padding")
    model, ids = make_model(name).to("meta"), make_ids().to("meta")
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert cache.get_seq_length() == LENGTH
    for step in range(1, 4):
        options = {"attention_mask": torch.ones(2, LENGTH + step, device="meta")} if masked else {}
        model(ids[:, :1], past_key_values=cache, **options)
        assert cache.get_seq_length() == LENGTH + step


@torch.no_grad()
@pytest.mark.parametrize("name", RECURRENT)
def test_a_generated_token_brings_no_mask_to_recurrent_layers(name):
    model, ids = make_model(name), make_ids()
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    for kwargs in seen[1:]:
        mask = kwargs.get("attention_mask")
        assert mask is None or mask["linear_attention"] is None


def test_the_layer_that_counts():
    counter = TokenCountLayer(compileable=True)
    assert counter.is_compileable is True and TokenCountLayer(compileable=False).is_compileable is False
    assert counter.get_seq_length() == 0 and counter.get_max_length() == -1
    counter.reorder_cache(torch.tensor([0]))
    counter.reset()
    counter.lazy_initialization(2, torch.device("cpu"))
    counter.update(torch.tensor([[1, 1, 1], [0, 1, 0]]), 3)
    counter.update(None, 2)
    assert counter.counts.tolist() == [[5, 5], [3, 5]] and counter.get_mask_sizes(4) == (9, 0)
    counter.reorder_cache(torch.tensor([1, 1]))
    assert counter.counts.tolist() == [[3, 5], [3, 5]]
    counter.is_croppable = True
    counter.crop(-2)
    assert counter.counts.tolist() == [[1, 3], [1, 3]] and counter.get_seq_length() == 3
    counter.reset()
    assert counter.counts.tolist() == [[0, 0], [0, 0]] and counter.get_seq_length() == 0


def test_states_take_back_tokens_by_negative_numbers_while_they_record():
    model, ids = make_model("paper"), make_ids()
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    make_croppable(cache, model.config)
    layer = cache.layers[1]
    assert type(layer).__name__.startswith("RollbackLinearAttention")
    message = "A recurrent layer takes back tokens by a negative number, and only while it records."
    for record, number in ((False, -1), (True, 1)):
        layer.record_past = record
        with refused(message, RuntimeError):
            layer.crop(number)


@pytest.mark.parametrize("model_class", HEADS)
def test_the_signature_has_the_name_of_the_cache_on_this_release(model_class):
    names = inspect.signature(model_class.forward).parameters
    assert CACHE_NAME in names and len({"cache", "past_key_values"} & set(names)) == 1
