import copy
import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonModel,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)

from worldvla_model import (
    CheckpointError,
    ConfigurationError,
    SequenceLengthError,
    WorldVLAConfig,
    WorldVLAForConditionalGeneration,
    WorldVLAModel,
    masks,
)
from worldvla_model.modeling_worldvla import as_attention_mask, cut_rows
from worldvla_tokenizers import Vocabulary, sequence

CHAMELEON_READS_ITS_OWN_CONFIG = pytest.mark.skipif(
    transformers.__version__.startswith("5.4."),
    reason="transformers 5.4 refuses the attention_bias that its own Chameleon configuration writes",
)
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
# transformers compiles flex_attention, which takes half a minute; what it compiles is checked uncompiled each day.
WITH_COMPILING = ["eager", "sdpa", "flex_uncompiled", pytest.param("flex_attention", marks=pytest.mark.slow)]


@pytest.fixture
def implementation(request):
    """Of attention, by the name that transformers has for it."""
    compiled = request.param != "flex_uncompiled"
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        yield request.param if compiled else "flex_attention"


@pytest.fixture(scope="module")
def batch(published):
    """The three samples of `logits.npz`, padded right with id 0, and their lengths."""
    chosen = [*published.samples(size=128, kind="action")[:2], published.samples(size=128, kind="world")[0]]
    lengths = [len(s["tokens"]) for s in chosen]
    ids = torch.tensor([s["tokens"] + [0] * (max(lengths) - len(s["tokens"])) for s in chosen])
    return ids, lengths


def check_against_reference(published, batch, hidden, logits=None):
    reference, (_, lengths) = published.arrays("logits"), batch
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], reference["hidden"][row, :length], rtol=0, atol=1e-5)
        if logits is not None:
            part = logits[row, :length]
            np.testing.assert_array_equal(part.argmax(-1), reference["argmax"][row, :length])
            logsumexp = part.logsumexp(-1)
            np.testing.assert_allclose(logsumexp, reference["logsumexp"][row, :length], rtol=0, atol=1e-5)
    if logits is not None:
        tail = logits[0, lengths[0] - 48 : lengths[0], 8_190:10_300]
        np.testing.assert_allclose(tail, reference["action_tail"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", WITH_COMPILING, indirect=True)
def test_hidden_states_and_logits_of_the_published_code(published, batch, implementation):
    model = WorldVLAForConditionalGeneration.from_pretrained(
        published.checkpoint, dtype=torch.float32, attn_implementation=implementation
    )
    assert not model.training
    with torch.inference_mode():
        output = model(batch[0], output_hidden_states=True)
    assert output.logits.dtype == torch.float32
    check_against_reference(published, batch, output.hidden_states[-1], output.logits)


def test_auto_classes_load_published_checkpoints(published, batch):
    model = AutoModel.from_pretrained(published.checkpoint, dtype=torch.float32)
    assert type(model) is WorldVLAModel
    with torch.inference_mode():
        check_against_reference(published, batch, model(batch[0]).last_hidden_state)
    assert type(AutoConfig.from_pretrained(published.checkpoint)) is WorldVLAConfig
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_pretrained(published.checkpoint)) is WorldVLAForConditionalGeneration


@CHAMELEON_READS_ITS_OWN_CONFIG
def test_plain_transformers_fails_on_published_checkpoints(published):
    """The reason for all this; if it passes one day, the registration can go."""
    with pytest.raises(RuntimeError, match="mismatch"):
        ChameleonModel.from_pretrained(published.checkpoint)


@CHAMELEON_READS_ITS_OWN_CONFIG
def test_other_peoples_chameleon_loads_as_it_did(tmp_path):
    vq = {"base_channels": 32, "channel_multiplier": [1, 1], "embed_dim": 8, "latent_channels": 8,
          "num_embeddings": 16, "num_res_blocks": 1, "resolution": 32}  # fmt: skip
    config = ChameleonConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, vq_config=vq, vocabulary_map={"<image>": 5, "IMGIMGAZ": 6}, bos_token_id=0,
    )  # fmt: skip
    theirs = ChameleonForConditionalGeneration(config)
    theirs.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is ChameleonForConditionalGeneration
    assert type(AutoConfig.from_pretrained(tmp_path)) is ChameleonConfig
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), theirs.parameters(), strict=True))
    assert type(AutoModel.from_config(config)) is ChameleonModel


def test_save_and_load_are_bit_equal(published, tmp_path):
    model = WorldVLAForConditionalGeneration.from_pretrained(published.checkpoint)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "worldvla"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_generation_ends_with_the_turn(published):
    model = WorldVLAForConditionalGeneration.from_pretrained(published.checkpoint)
    assert model.generation_config.eos_token_id == 8_710


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"qk_norm": "per_head"}, {"mlp_bias": True}])
def test_variants_save_and_load(small_config, tmp_path, changes):
    config = WorldVLAConfig(**{**small_config.to_dict(), **changes})
    model = WorldVLAForConditionalGeneration(config).eval()
    heads = 1 if config.qk_norm == "shared" else 4
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (heads, 8)
    model.save_pretrained(tmp_path)
    again = WorldVLAForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 16_640, (1, 20))
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, again(ids).logits)
    tied = again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert tied == config.tie_word_embeddings


def test_repeated_shared_norms_equal_per_head_norms(small, small_config):
    with torch.no_grad():
        for module in small.modules():
            if type(module).__name__ == "ChameleonLayerNorm":
                module.weight.normal_(1, 0.1)
                module.bias.normal_(0, 0.1)
    config = WorldVLAConfig(**{**small_config.to_dict(), "qk_norm": "per_head"})
    wide = WorldVLAForConditionalGeneration(config).eval()
    state = small.state_dict()
    for name, value in wide.state_dict().items():
        if "_norm." in name:
            state[name] = state[name].expand_as(value)
    wide.load_state_dict(state)
    ids = torch.randint(0, 16_640, (2, 20))
    with torch.inference_mode():
        assert torch.equal(small(ids).logits, wide(ids).logits)


blocks = st.sampled_from([[16_400, 16_401], [8_197, 8_805, 50, 8_196], [10_004, 10_100, 10_101, 15_004], [8_710]])


@settings(max_examples=25)
@given(
    st.lists(blocks, min_size=2, max_size=8), st.sampled_from(["causal", "action_isolated_everywhere"]), st.data()
)
def test_cached_equals_uncached(parts, strategy, data):
    torch.manual_seed(0)
    config = WorldVLAConfig(
        vocab_size=16_640, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, attn_implementation="sdpa",
    )  # fmt: skip
    model = WorldVLAForConditionalGeneration(config).eval()
    ids = torch.tensor([[0, *(token for part in parts for token in part)]])
    length = ids.shape[1]
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(1, length - 1), max_size=4))})
    with torch.inference_mode():
        whole = model(ids, attention=strategy).logits
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=48)):
            pieces = []
            for start, stop in pairwise(cuts):
                output = model(
                    ids[:, start:stop], context_ids=ids[:, :stop], past_key_values=cache, use_cache=True,
                    attention=strategy,
                )  # fmt: skip
                pieces.append(output.logits)
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", [pytest.param("eager", marks=pytest.mark.slow), "sdpa"])
def test_one_graph_without_breaks(published, model, implementation):
    """The whole forward traces into one graph, prefill and steps over a static cache alike."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    ids = torch.tensor([published.samples(size=128, kind="action")[0]["tokens"]])
    traced = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        expected = model(ids).logits
        torch.testing.assert_close(traced(ids).logits, expected)
        cache = StaticCache(config=model.config, max_cache_len=256)
        traced(ids[:, :169], context_ids=ids[:, :169], past_key_values=cache, use_cache=True)
        for t in range(169, 172):
            step = traced(ids[:, t : t + 1], context_ids=ids[:, : t + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(step.logits[:, 0], expected[:, t], rtol=1e-5, atol=1e-5)


def test_cached_tokens_need_their_ids(small):
    ids = torch.tensor([[0, 16_400, 16_401]])
    cache = small(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"pass context_ids, \(batch, 4\)"):
        small(ids[:, :1], past_key_values=cache)
    small(ids[:, :1], past_key_values=cache, attention="causal")  # blocks do not matter here


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", WITH_COMPILING, indirect=True)
def test_padding_changes_nothing(published, implementation, side):
    model = WorldVLAForConditionalGeneration.from_pretrained(
        published.checkpoint, dtype=torch.float32, attn_implementation=implementation
    )
    sample = published.samples(size=128, kind="action")[1]["tokens"]
    pad = [1] * 18
    ids = torch.tensor([pad + sample if side == "left" else sample + pad])
    mask = (ids != 1).long()
    with torch.inference_mode():
        alone = model(torch.tensor([sample])).logits
        padded = model(ids, attention_mask=mask).logits
    part = padded[:, len(pad) :] if side == "left" else padded[:, : len(sample)]
    torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-5)


def test_masks_given_by_the_caller_are_taken_as_they_are(model, published):
    ids = torch.tensor([published.samples(size=128, kind="action")[0]["tokens"]])
    dense = masks.dense("first_image_only", ids, model.config)[:, None]
    with torch.inference_mode():
        expected = model(ids, attention="first_image_only").logits
        torch.testing.assert_close(model(ids, attention_mask=dense).logits, expected)
        assert not torch.allclose(model(ids).logits, expected)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_the_published_continuations(published, model, cache):
    for reference in published.json("generations")[:2]:
        prompt = torch.tensor([reference["prompt"]])
        output = model.generate(prompt, max_new_tokens=80, do_sample=False, cache_implementation=cache)
        assert output[0, prompt.shape[1] :].tolist() == reference["generated"]


def test_guesses_from_the_prompt_change_no_ids(published, model):
    for reference in published.json("generations"):
        prompt = torch.tensor([reference["prompt"]])
        output = model.generate(prompt, do_sample=False, prompt_lookup_num_tokens=8)
        assert output[0, prompt.shape[1] :].tolist() == reference["generated"]


# On a CPU the compiled kernel of flex_attention takes no fp64.
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_uncompiled"], indirect=True)
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 8}, {"use_cache": False}])
def test_guessed_images_are_not_seen_by_what_comes_before_them(small, implementation, options):
    """An action after the last image is kept apart from others, and whether an image follows is a guess."""
    small = small.double()  # in fp32 near ties could fall either way
    vocabulary = Vocabulary.published()
    image = sequence.image_block([[1, 2], [3, 4]], vocabulary)
    actions = [token for value in (10_006, 10_106) for token in sequence.action_block([value] * 7, vocabulary)]
    # After the first end of turn comes an image: so it is guessed after the last one.
    prompt = torch.tensor([[0, vocabulary.eot, *image, *actions, vocabulary.eot]])
    expected = small.generate(prompt, do_sample=False, max_new_tokens=6)
    small.set_attn_implementation(implementation)
    assert torch.equal(small.generate(prompt, do_sample=False, max_new_tokens=6, **options), expected)


def test_steps_over_a_static_cache_are_compiled_once(small):
    small, graphs = small.double(), []
    compiled = CompileConfig(
        backend=lambda graph, _: graphs.append(graph) or graph.forward, mode="default", fullgraph=True
    )
    compiled._compile_all_devices = True
    for length in (9, 12, 30):
        prompt = torch.randint(16_390, 16_640, (1, length))
        expected = small.generate(prompt, do_sample=False, max_length=40)
        options = {"cache_implementation": "static", "compile_config": compiled, "max_length": 40}
        assert torch.equal(small.generate(prompt, do_sample=False, **options), expected)
        assert len(graphs) == 1


def test_prompts_are_not_read_in_parts(small):
    with pytest.raises(ValueError, match="prefill_chunk_size is 4; allowed: None"):
        small.generate(torch.zeros(1, 9, dtype=torch.long), prefill_chunk_size=4)


def test_generate_in_a_left_padded_batch(published, model):
    references = [r for r in published.json("generations") if r["kind"] == "action"]
    longest = max(len(r["prompt"]) for r in references)
    rows = [[1] * (longest - len(r["prompt"])) + r["prompt"] for r in references]
    ids = torch.tensor(rows)
    output = model.generate(ids, attention_mask=(ids != 1).long(), max_new_tokens=50, do_sample=False)
    for row, reference in zip(output[:, longest:].tolist(), references, strict=True):
        assert row[: len(reference["generated"])] == reference["generated"]


def test_generate_goes_on_to_the_end_of_the_turn(published, model):
    """Where nobody says how far: transformers' 20 tokens are no chunk."""
    generations = published.json("generations")
    for reference in (next(r for r in generations if r["kind"] == kind) for kind in ("world", "action")):
        prompt = torch.tensor([reference["prompt"]])
        assert model.generate(prompt)[0, prompt.shape[1] :].tolist() == reference["generated"]
    prompt, answer = torch.tensor([reference["prompt"]]), reference["generated"]
    limits = [{"max_new_tokens": 3}, {"max_length": prompt.shape[1] + 3}]
    for limit in [
        *limits,
        {"generation_config": GenerationConfig(**limits[0], eos_token_id=8_710, pad_token_id=1)},
    ]:
        assert model.generate(prompt, **limit)[0, prompt.shape[1] :].tolist() == answer[:3]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_embeddings_instead_of_ids_where_no_block_matters(small, implementation):
    small.set_attn_implementation(implementation)
    ids = torch.randint(16_390, 16_640, (2, 12))
    embeddings, padding = small.get_input_embeddings()(ids), torch.ones_like(ids)
    padding[0, :5] = 0
    with torch.inference_mode():
        for mask in (None, padding):
            expected = small(ids, attention_mask=mask, attention="causal").logits
            found = small(inputs_embeds=embeddings, attention_mask=mask, attention="causal").logits
            assert torch.equal(found, expected)
        # Blocks matter: with the ids beside them it is the same as with ids alone.
        assert torch.equal(small(inputs_embeds=embeddings, context_ids=ids).logits, small(ids).logits)
    for forward in (small, small.model):
        with pytest.raises(ValueError, match=r"'action_isolated' depends on the ids .*'causal' needs none"):
            forward(inputs_embeds=embeddings)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}]
)
def test_generate_from_embeddings(small_config, options):
    torch.manual_seed(0)
    config = WorldVLAConfig(**{**small_config.to_dict(), "attention": "causal"})
    model = WorldVLAForConditionalGeneration(config).eval()
    ids = torch.randint(16_390, 16_640, (2, 9))
    padding = torch.ones_like(ids)
    padding[1, :3] = 0
    inputs = {"attention_mask": padding, "max_new_tokens": 5, "do_sample": False, **options}
    expected = model.generate(ids, **inputs)[:, 9:]
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **inputs), expected)
    assert torch.equal(model.generate(ids, inputs_embeds=embeddings, **inputs)[:, 9:], expected)


def test_generate_from_embeddings_where_blocks_matter(published, model):
    prompt = torch.tensor([next(r for r in published.json("generations") if r["kind"] == "action")["prompt"]])
    embeddings = model.get_input_embeddings()(prompt)
    with pytest.raises(ValueError, match="'action_isolated' depends on the ids of all tokens"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=3)
    expected = model.generate(prompt)
    assert torch.equal(model.generate(prompt, inputs_embeds=embeddings), expected)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"torch_dtype": torch.float32}, torch.float32), ({"torch_dtype": "float32", "dtype": "auto"}, torch.float32),
     ({"torch_dtype": "auto"}, torch.bfloat16), ({}, torch.bfloat16)],
)  # fmt: skip
@pytest.mark.parametrize("load", [WorldVLAForConditionalGeneration, WorldVLAModel, AutoModelForCausalLM])
def test_the_older_name_of_dtype(published, load, options, dtype):
    assert load.from_pretrained(published.checkpoint, **options).dtype == dtype


def test_names_that_contradict_each_other(published):
    with pytest.raises(ValueError, match=r"dtype is bfloat16 and torch_dtype, its older name, is torch\.float32"):
        WorldVLAForConditionalGeneration.from_pretrained(
            published.checkpoint, dtype="bfloat16", torch_dtype=torch.float32
        )


def test_gradient_checkpointing_gives_the_same_gradients(small_config):
    ids = torch.randint(16_390, 16_640, (2, 24))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = WorldVLAForConditionalGeneration(small_config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()  # 5.4 has no other name for it
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_residual_dropout_acts_in_training_only(small_config):
    config = WorldVLAConfig(**{**small_config.to_dict(), "dropout": 0.5})
    model = WorldVLAForConditionalGeneration(config)
    ids = torch.randint(16_390, 16_640, (1, 10))
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_hidden_states_and_attentions_are_recorded(small):
    small.set_attn_implementation("eager")
    output = small(torch.tensor([[0, 16_400, 16_401]]), output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in output.hidden_states] == [(1, 3, 32)] * 3
    assert [a.shape for a in output.attentions] == [(1, 4, 3, 3)] * 2


def test_device_map_and_half_precision(published):
    model = WorldVLAForConditionalGeneration.from_pretrained(
        published.checkpoint, device_map="cpu", dtype=torch.bfloat16
    )
    logits = model(torch.tensor([[0, 16_400]])).logits
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_uncompiled"], indirect=True)
@pytest.mark.parametrize("attention", ["causal", "action_isolated"])
def test_states_that_are_kept_are_those_of_all(published, batch, implementation, attention):
    model = WorldVLAModel.from_pretrained(published.checkpoint, attn_implementation=implementation)
    (ids, lengths), cached, thinned = batch, DynamicCache(), DynamicCache()
    given = {"attention_mask": torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]}
    if attention == "causal":
        given = {}  # sdpa has a kernel for it, and no mask then
    columns = torch.tensor([[5, 0, 17], [3, 3, 40], [1, 2, 90]])
    with torch.no_grad():
        whole = model(ids, attention=attention, past_key_values=cached, **given).last_hidden_state
        kept = model(
            ids, attention=attention, past_key_values=thinned, states_to_keep=columns, **given
        ).last_hidden_state
    torch.testing.assert_close(kept, whole[torch.arange(3)[:, None], columns], rtol=0, atol=1e-5)
    for one, other in zip(cached.layers, thinned.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_in_blocks_of_rows_give_what_they_give_whole(small, implementation):
    small = small.double()
    small.set_attn_implementation(implementation)
    V, rng = Vocabulary.published(), np.random.default_rng(0)
    action = [V.boa, *([V.action_range[3]] * 7), V.eoa]
    image = sequence.image_block(rng.integers(0, 8_192, (8, 12)), V)
    prompt = [*rng.integers(1, 4_000, 300).tolist(), *image, *action]
    ids = torch.tensor([[*prompt, *action], [*prompt[:100], *action, *prompt[100:]]])
    allowed = masks.dense("action_isolated", ids, V)
    mask = as_attention_mask(allowed[:, None], implementation, torch.float64)
    blocks = cut_rows(allowed)
    assert [seen for _, seen in blocks] == [256, ids.shape[1]]
    with torch.no_grad():
        whole, cut = (
            small.model(ids, attention_mask=mask, row_blocks=b).last_hidden_state for b in (None, blocks)
        )
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)
    assert cut_rows(allowed[:, :256]) is None  # nothing to gain


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_too_many_positions(small, implementation):
    small.set_attn_implementation(implementation)
    with pytest.raises(SequenceLengthError, match=r"sequence of 513 tokens; the model has 512 positions"):
        small(torch.zeros(1, 513, dtype=torch.long))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("attention", "isolated", "attention is 'isolated'; allowed: 'causal', 'action_isolated'"),
        ("loss", ["paper"], r"loss is \['paper'\]; allowed: 'published', 'paper'"),
        ("hidden_act", "rellu", "hidden_act is 'rellu'; allowed: "),
        ("vocab_size", 2**40, r"vocab_size is 1099511627776; allowed: whole numbers from 1 to 2147483647"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0; allowed: whole numbers from 1"),
        ("hidden_size", "64", "hidden_size is '64'; allowed: whole numbers"),
        ("dropout", float("nan"), "dropout is nan; allowed: numbers from 0"),
        ("rms_norm_eps", None, "rms_norm_eps is None; allowed: numbers from 0"),
        ("use_cache", 1, "use_cache is 1; allowed: true and false"),
        ("boi_token_id", -1, "boi_token_id is -1; allowed: ids"),
        ("rope_parameters", "linear", "rope_parameters is 'linear'; allowed: an object"),
        ("num_key_value_heads", 3, "num_attention_heads is 4; a multiple of num_key_value_heads, 3"),
        ("qk_norm", "both", "qk_norm is 'both'; allowed: 'shared', 'per_head'"),
        ("num_attention_heads", 3, "a multiple of num_attention_heads, 3"),
    ],
)
def test_bad_settings(setting, value, message):
    content = {"hidden_size": 64, "num_attention_heads": 4, setting: value}
    for make in (lambda: WorldVLAConfig(**content), lambda: WorldVLAConfig.from_dict(content)):
        with pytest.raises(ConfigurationError, match=message):
            make()


def test_what_transformers_itself_trips_over(tmp_path):
    for content in ("{half", "[1]", '"x"', "3"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigurationError, match="is no JSON object"):
            WorldVLAConfig.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        WorldVLAConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="transformers can make no configuration of it"):
        WorldVLAConfig.from_dict({"id2label": "x"})


def test_both_or_neither_input(small):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        small()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (lambda t: t.update(extra=torch.zeros(2)), "1 unexpected: extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"1 of another shape: model\.norm\.weight \(7,\), \(64,\) needed",
        ),
    ],
)
def test_checkpoint_that_does_not_fit(published, tmp_path, damage, message):
    tensors = {}
    for shard in published.checkpoint.glob("*.safetensors"):
        tensors.update(load_file(shard))
    damage(tensors)
    shutil.copy(published.checkpoint / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        WorldVLAForConditionalGeneration.from_pretrained(tmp_path)
    if "unexpected" not in message:
        with pytest.raises(CheckpointError, match=message.replace(r"model\.", "")):
            AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.replace(b"{", b"?", 1), "invalid JSON"),
        (lambda content: content[:-1], "incomplete"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "begin with b'version https://git-lfs"),
        (lambda content: b"", "0 bytes"),
    ],
)
def test_damaged_weights_are_named(published, tmp_path, damage, message):
    shutil.copytree(published.checkpoint, tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"model-00002-of-00003\.safetensors is no whole .*{message}"):
        WorldVLAForConditionalGeneration.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read_unless_asked(small, tmp_path):
    small.config.save_pretrained(tmp_path)
    torch.save(small.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        WorldVLAForConditionalGeneration.from_pretrained(tmp_path)
    assert WorldVLAForConditionalGeneration.from_pretrained(tmp_path, use_safetensors=False) is not None
