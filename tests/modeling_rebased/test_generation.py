"""generate() and everything around it, as a user of transformers calls it."""

import copy
import functools

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation import utils as generation_utils

from modeling_rebased import ReBasedForCausalLM
from tests.modeling_rebased.cases import BASE, MODELS, RECURRENT, make_ids, make_model, make_small_model


def greedy_reference(model, ids, steps):
    """Greedy decoding without any cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def generate(model, ids=None, **options):
    return model.generate(ids, **{"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options})


class NumberTokenizer:
    """The least that a streamer asks of a tokenizer."""

    def decode(self, ids, **kwargs):
        return "".join(f"{int(i)} " for i in ids)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_greedy(name):
    model, ids = make_model(name), make_ids()
    expected = greedy_reference(model, ids, 6)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)
    assert torch.equal(generate(model, ids, past_key_values=DynamicCache(config=model.config)), expected)
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(generate(model, ids, past_key_values=cache), expected)
    assert torch.equal(generate(model, ids, use_cache=False), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_left_padded_rows_generate_as_lone_ones(name):
    model, ids = make_model(name), make_ids()
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    out = generate(model, ids, attention_mask=mask)
    assert torch.equal(out[:1], greedy_reference(model, ids[:1], 6))
    assert torch.equal(out[1:, 8:], greedy_reference(model, ids[1:, 8:], 6))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_going_on_from_a_returned_cache(name):
    model, ids = make_model(name), make_ids()
    expected = greedy_reference(model, ids, 6)
    first = generate(model, ids, max_new_tokens=3, return_dict_in_generate=True)
    out = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=3)
    assert torch.equal(out, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "every_type"])
def test_a_prompt_prefilled_by_hand(name):
    model, ids = make_model(name), make_ids()
    cache = model(ids[:, :-1]).past_key_values
    assert torch.equal(generate(model, ids, past_key_values=cache), greedy_reference(model, ids, 6))


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "every_type"])
def test_chunked_prefill(name):
    model, ids = make_model(name), make_ids()
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), greedy_reference(model, ids, 6))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_beam_search(name):
    model, ids = make_model(name), make_ids()
    options = {"num_beams": 3, "num_return_sequences": 2}
    out = generate(model, ids, **options)
    assert out.shape == (4, 29)
    assert torch.equal(out, generate(model, ids, use_cache=False, **options))


@torch.no_grad()
def test_sampling_and_num_return_sequences():
    model, ids = make_model("paper"), make_ids()
    torch.manual_seed(0)
    out = generate(model, ids, do_sample=True, top_k=5, num_return_sequences=3)
    assert out.shape == (6, 29)
    torch.manual_seed(0)
    assert torch.equal(out, generate(model, ids, do_sample=True, top_k=5, num_return_sequences=3))


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "mqar", "every_type"])
def test_inputs_embeds(name):
    model, ids = make_model(name), make_ids()
    out = generate(model, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(out, greedy_reference(model, ids, 6)[:, 23:])


@torch.no_grad()
def test_stopping_and_streaming(capsys):
    model, ids = make_model("paper"), make_ids(1)
    expected = greedy_reference(model, ids, 6)
    out = generate(model, ids, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(26)]))
    assert torch.equal(out, expected[:, :26])
    stop = int(expected[0, 25])
    assert generate(model, ids, eos_token_id=stop)[0, -1] == stop

    generate(model, ids, streamer=TextStreamer(NumberTokenizer(), skip_prompt=True))
    assert capsys.readouterr().out.split() == [str(int(i)) for i in expected[0, 23:]]
    streamer = TextIteratorStreamer(NumberTokenizer(), skip_prompt=True)
    generate(model, ids, streamer=streamer)
    assert "".join(streamer).split() == [str(int(i)) for i in expected[0, 23:]]


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_positions_of_a_model_compiled_for_any_batch(rows):
    """Earlier calls with other batches make that of `input_ids` a dynamic size, and not that of `position_ids`."""
    model, ids = make_small_model("paper"), make_ids(2, 5)
    expected = model(ids).logits
    torch._dynamo.reset()
    torch._dynamo.maybe_mark_dynamic(ids, 0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, position_ids=torch.arange(5).expand(rows, -1)).logits, expected)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "every_type"])
def test_static_cache_compiled(name):
    model, ids = make_small_model(name), make_ids()
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    out = generate(model, ids, cache_implementation="static", compile_config=config)
    assert torch.equal(out, greedy_reference(model, ids, 6))


@pytest.mark.parametrize("name", RECURRENT)
def test_a_plain_cache_cannot_be_cropped(name):
    model, ids = make_model(name), make_ids(1)
    cache = model(ids).past_key_values
    with pytest.raises(NotImplementedError, match="cannot record its past"):
        cache.activate_past_recording()
    cache = model(ids).past_key_values
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        cache.crop(-2)


def sliding_layers_record_several_steps():
    """Whether the library's sliding window sizes its mask right after several steps without `crop`; 5.17 does not."""
    layer, x = DynamicSlidingWindowLayer(sliding_window=3), torch.zeros(1, 1, 1, 1)
    layer.activate_past_recording()
    fits = []
    for _ in range(6):
        size, _ = layer.get_mask_sizes(1)
        fits.append(layer.update(x, x)[0].shape[2] == size)
    return all(fits)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["lookup", "draft", "same"])
def test_assisted_generation(name, kind):
    """States take back drafted tokens exactly: the tokens and logits of decoding without a cache."""
    model = make_model(name)
    windowed = {"sliding_attention", "hybrid_sliding"} & set(model.config.layer_types)
    if windowed and kind != "lookup" and not sliding_layers_record_several_steps():
        pytest.skip("this transformers cannot draft with sliding windows")
    ids = torch.cat([make_ids(1), make_ids(1)], dim=1)
    options = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "draft": {"assistant_model": make_model(name, norm_eps=0.3)},
        "same": {"assistant_model": model},
    }[kind]
    accepted = []
    model.register_forward_hook(lambda module, args, outputs: accepted.append(outputs.logits.shape[1]))
    options |= {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}
    out = generate(model, ids, **options)
    steps = len(accepted)
    assert torch.equal(out.sequences, greedy_reference(model, ids, 12))
    expected = model(out.sequences, use_cache=False).logits[:, 45:-1]
    assert ((torch.stack(out.logits, dim=1) - expected).norm() / expected.norm()).item() < 1e-5
    if kind == "draft" and name == "paper":
        assert steps < 12  # some drafted tokens were accepted


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "softmax"])
def test_a_given_cache_is_refused_where_tokens_would_enter_it_twice(name):
    """The library would feed the cached tokens again, to any model."""
    model, ids = make_model(name), make_ids(1)
    cache = DynamicCache(config=model.config)
    answer = generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=2)
    assert torch.equal(answer, greedy_reference(model, ids, 6))
    with pytest.raises(ValueError, match="cannot continue from"):
        generate(model, answer, past_key_values=cache, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="`use_cache=False` feeds the whole text"):
        generate(model, answer, past_key_values=cache, use_cache=False)


@torch.no_grad()
def test_drafts_of_the_first_layers():
    """`assistant_early_exit` drafts with one layer or more of the model itself."""
    model, ids = make_model("every_type"), make_ids(1)
    shorter = copy.deepcopy(model.config)
    shorter.num_hidden_layers = 1
    if len(DynamicCache(config=shorter).layers) > 1:
        pytest.skip("this transformers makes a cache for all layers")
    expected = greedy_reference(model, ids, 6)
    for layers in range(1, model.config.num_hidden_layers):
        assert torch.equal(generate(model, ids, assistant_early_exit=layers), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mqar", "every_type"])
def test_rows_of_a_cache_are_repeated_and_selected(name):
    """As contrastive search does: each row tries several tokens, and goes on with one of them."""
    model, ids = make_model(name), make_ids()
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    cache.batch_repeat_interleave(3)
    tried = torch.cat([ids.repeat_interleave(3, 0), torch.arange(10, 16)[:, None]], dim=1)
    masks = torch.nn.functional.pad(mask.repeat_interleave(3, 0), (0, 1), value=1)
    logits = model(tried[:, -1:], attention_mask=masks, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(tried, attention_mask=masks, use_cache=False).logits[:, -1:])
    chosen = torch.tensor([1, 5])
    cache.batch_select_indices(chosen)
    tried = torch.cat([tried[chosen], torch.tensor([[7], [8]])], dim=1)
    masks = torch.nn.functional.pad(masks[chosen], (0, 1), value=1)
    logits = model(tried[:, -1:], attention_mask=masks, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(tried, attention_mask=masks, use_cache=False).logits[:, -1:])


def test_assisted_generation_needs_a_dynamic_cache():
    model, ids = make_model("paper"), make_ids(1)
    message = "recurrent layers needs a `DynamicCache`, but the cache is a StaticCache.$"
    with pytest.raises(ValueError, match=f"(?i)assisted gener|^Assisted generation of a model with {message}"):
        generate(model, ids, prompt_lookup_num_tokens=3, cache_implementation="static")


@torch.no_grad()
def test_a_recurrent_model_drafts_for_a_softmax_model():
    model, ids = make_model("softmax"), make_ids(1)
    expected = greedy_reference(model, ids, 6)
    assert torch.equal(generate(model, ids, assistant_model=make_model("paper")), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_a_continuation(name):
    """A continuation takes in only what is new: tokens that a state took in twice might leave the choice as it is."""
    model, ids = make_model(name), make_ids()
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    first = generate(model, ids, **options)
    second = generate(model, first.sequences, past_key_values=first.past_key_values, **options)
    steps = torch.stack(first.logits + second.logits, dim=1)
    expected = model(second.sequences, use_cache=False).logits[:, 22:-1]
    assert ((steps - expected).norm() / expected.norm()).item() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "mqar"])
def test_the_compiled_step_serves_every_length(name):
    """One graph without recompilation, and all that it changes has a fixed address, as CUDA graphs need it."""
    graphs, addresses = [], set()

    def inspect_graph(graph, inputs):
        meta = torch._guards.TracingContext.get().fw_metadata
        changed = {i for i, x in enumerate(meta.input_info) if x.mutates_data}
        graphs.append((changed, set(meta.static_input_indices)))
        assert all(isinstance(x, torch.Tensor) for x in inputs)

        def run(*inputs):
            addresses.add(tuple(inputs[i].data_ptr() for i in sorted(changed)))
            return graph.forward(*inputs)

        return run

    backend = aot_autograd(fw_compiler=inspect_graph, keep_inference_input_mutations=True)
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    model = make_model(name)
    blocks = []
    for length, new in ((23, 4), (17, 9), (30, 6)):
        ids = make_ids(1, length)
        out = generate(model, ids, max_new_tokens=new, cache_implementation="static", compile_config=config)
        assert torch.equal(out, greedy_reference(model, ids, new))
        blocks += [torch.empty(2**k) for k in range(4, 16)]  # in the place of states that were not kept
    ((changed, static),) = graphs
    # The state of each layer, and the counts.
    assert len(changed) == model.config.num_hidden_layers + 1
    assert changed <= static
    assert len(addresses) <= 2  # what compiles in the first call may hold its cache for longer


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "mqar"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_step_gets_only_what_it_reads(name, cache, monkeypatch):
    """No mask is made or made longer for a step, and positions only where an embedding reads them."""
    model, ids = make_small_model(name), make_ids()
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    seen, made = [], []
    forward, make_masks = model.forward, ReBasedForCausalLM.create_masks_for_generate

    @functools.wraps(forward)  # `generate` reads the signature
    def see(*args, **inputs):
        seen.append({key for key, value in inputs.items() if isinstance(value, torch.Tensor)})
        return forward(*args, **inputs)

    def count(*args, **kwargs):
        made.append(len(seen))
        return make_masks(*args, **kwargs)

    model.forward = see
    monkeypatch.setattr(ReBasedForCausalLM, "create_masks_for_generate", staticmethod(count))
    out = generate(model, ids, attention_mask=mask, cache_implementation=cache)
    del model.forward
    expected = {"input_ids"} | ({"position_ids"} if name == "mqar" else set())
    assert seen[1:] == [expected] * 5
    assert set(made) <= {0}  # before the first call of forward
    assert torch.equal(out[1:, 8:], greedy_reference(model, ids[1:, 8:], 6))


class Event:
    """Stand in for `torch.Event`, of which a CPU has none: nothing is late there."""

    def __init__(self, **options):
        pass

    record = synchronize = __init__


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "every_type"])
def test_the_end_is_found_one_step_late_on_a_gpu(name, monkeypatch, capsys):
    """The texts are the same, whatever ends them, and a cache that the caller sees has no step too many."""
    made, library = [], generation_utils.DeferredStopCheck

    class Check(library):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

        @staticmethod
        def is_supported(device, *args, **kwargs):
            return library.is_supported(torch.device("cuda"), *args, **kwargs)

    model, ids = make_model(name), make_ids()
    first, second = generate(model, ids, max_new_tokens=12)[:, ids.shape[1] :][:2].tolist()
    ends = [first[4], second[7]]
    streamer = functools.partial(TextStreamer, NumberTokenizer(), skip_prompt=True)
    calls = [
        {"max_new_tokens": 12},
        {"max_new_tokens": 12, "eos_token_id": ends},
        {"max_new_tokens": 12, "eos_token_id": ends, "cache_implementation": "static"},
        {"max_new_tokens": 1},
        {"max_new_tokens": 12, "eos_token_id": first[4], "ids": ids[:1], "streamer": streamer},
    ]

    def call(ids=ids, streamer=None, **options):
        tokens = generate(model, ids, **options, **({"streamer": streamer()} if streamer is not None else {}))
        return tokens.tolist(), capsys.readouterr().out

    expected = [call(**options) for options in calls]
    kept = DynamicCache(config=model.config)
    returned = generate(model, ids, max_new_tokens=12, eos_token_id=ends, past_key_values=kept)
    monkeypatch.setattr(generation_utils, "DeferredStopCheck", Check)
    monkeypatch.setattr(torch, "Event", Event)
    assert [call(**options) for options in calls] == expected
    assert len(made) == len(calls)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, max_new_tokens=12, eos_token_id=ends, past_key_values=cache), returned)
    assert len(made) == len(calls)
    assert cache.get_seq_length() == kept.get_seq_length()


@torch.no_grad()
def test_calls_with_a_static_cache_do_not_disturb_one_another():
    """The states of an earlier call serve the next one, but not where they have another owner or size."""
    model = make_small_model("paper")

    def check(ids, **options):
        """Compare the logits of every step with those of the whole sequence."""
        steps = []

        def see(ids, scores):
            steps.append(scores.clone())
            return scores

        options |= {"cache_implementation": "static", "logits_processor": LogitsProcessorList([see])}
        out = generate(model, ids, **options)
        expected = model(getattr(out, "sequences", out), use_cache=False).logits[:, ids.shape[1] - 1 : -1].float()
        torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=1e-4, atol=1e-5)
        return out

    one, two, other = make_ids(1, 9), make_ids(2, 12), make_ids(1, 14)
    check(one)
    # The caller sees this cache, and may keep its states alone.
    layers = check(one, return_dict_in_generate=True).past_key_values.layers
    states = [x for x in (*(layer.recurrent_states[0] for layer in layers[:-1]), layers[-1].counts) if x is not None]
    before = [x.clone() for x in states]
    for ids in (other, two, one, other):
        check(ids)
    assert all(torch.equal(x, y) for x, y in zip(before, states, strict=True))

    def call_inside(ids, scores, **kwargs):
        check(other)
        return torch.zeros(len(ids), dtype=torch.bool)

    check(one, stopping_criteria=StoppingCriteriaList([call_inside]))
    beams = generate(model, two, num_beams=3)
    assert torch.equal(generate(model, two, num_beams=3, cache_implementation="static"), beams)
    check(make_ids(6, 12))  # as many rows as beams
    with torch.inference_mode():
        check(one)
    check(one)
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, one, cache_implementation="static")
    check(one)


@torch.no_grad()
def test_generation_config_of_the_checkpoint(tmp_path):
    model, ids = make_model("paper"), make_ids()
    model.generation_config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = ReBasedForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids), greedy_reference(model, ids, 4))


def test_text_generation_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(BASE["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w1", eos_token="w2")
    tokenizer.padding_side = "left"
    model = make_model("paper")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    texts = generator(["w3 w4 w5 w6", "w7"], batch_size=2, **options)
    expected = greedy_reference(model, torch.tensor([[7]], device=model.device), 4)[0, 1:]  # on a GPU if there is one
    assert texts[1][0]["generated_text"] == "w7" + tokenizer.decode(expected)


def test_the_mask_of_a_decoding_step_looks_the_same_at_every_length():
    """Else torch.compile compiles again, and CUDA graphs are recorded again, for every token of a batch of 1."""
    model = make_model("paper")
    strides = set()
    for length in (30, 31):
        mask = torch.zeros(1, length, dtype=torch.int64)  # with padding, so that the mask is kept
        masks = model.create_masks_for_generate(model.config, torch.empty(1, 1, 0), mask, None)
        strides.add(masks["linear_attention"].stride())
    assert len(strides) == 1
