"""Embeddings against transformers' hidden states, whatever is cut, cached, preempted or generated beside them."""

import asyncio
import threading

import numpy as np
import pytest

from jaxengine import LLM, AsyncLLM, RequestError, SamplingParams
from jaxengine.reranking import TEMPLATE
from tests.references import embeddings, tiny
from tests.tiny_llm import OPTIONS, VOCAB, check_integrity, fresh_llm, model_folder, shared_llm

PROMPTS = [[11 * i % 590 + 3 for i in range(n)] for n in (1, 8, 33, 75)]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("model", embeddings.MODELS)
def test_vectors_are_those_of_transformers(model, shipped_model, tmp_path):
    """In chunks of at most 32 tokens, beside a request that generates."""
    folder = shipped_model if model == "shipped" else tiny.write_checkpoint(model, tmp_path)
    prompts, reference = embeddings.prompts(model), embeddings.reference(model)
    beside = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
    with LLM(folder, dtype="float32", **OPTIONS) as llm:
        other = threading.Thread(target=llm.generate, args=([[5, 6, 7]], beside), kwargs={"use_tqdm": False})
        other.start()
        for pooling, want in reference.items():
            found = llm.embed(prompts, pooling=pooling, normalize=False, use_tqdm=False)
            np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
            np.testing.assert_allclose(llm.embed(prompts, pooling=pooling, use_tqdm=False), unit(want), atol=1e-4)
        other.join()
        check_integrity(llm)
        assert llm.get_metrics()["generation_tokens"] == 30


def test_dimensions_are_cut_before_the_length_is_made_one():
    llm = shared_llm()
    whole = llm.embed(PROMPTS, normalize=False, use_tqdm=False)
    np.testing.assert_allclose(llm.embed(PROMPTS, dimensions=5, use_tqdm=False), unit(whole[:, :5]), atol=1e-5)
    assert llm.embed("a text", dimensions=1, use_tqdm=False).tolist() in ([[1.0]], [[-1.0]])
    assert llm.embed([], use_tqdm=False).shape == (0, 64)


@pytest.mark.parametrize("pooling", embeddings.POOLINGS)
def test_preempted_and_cached_vectors_are_the_same(pooling):
    prompts = [[i + 3, *PROMPTS[3][:60]] for i in range(8)]
    want = shared_llm().embed(prompts, pooling=pooling, use_tqdm=False)
    with fresh_llm(pages=12) as llm:
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        long = llm.generate([[7] * 20], params, priority=-9, stream=True)
        next(long)
        np.testing.assert_allclose(llm.embed(prompts, pooling=pooling, use_tqdm=False), want, atol=1e-5)
        list(long)
        assert llm.get_metrics()["num_preemptions"] > 0
        check_integrity(llm)
    with fresh_llm() as llm:
        for _ in range(2):
            np.testing.assert_allclose(llm.embed(prompts[:2], pooling=pooling, use_tqdm=False), want[:2], atol=1e-5)
        assert llm.get_metrics()["prefix_cache_hits"] == (2 * 56 if pooling == "last" else 0)


def test_a_text_may_fill_max_model_len():
    llm, long = shared_llm(), [3 + i % 500 for i in range(300)]
    [full, cut] = llm.embed([long[:256], long], truncate=True, use_tqdm=False)
    np.testing.assert_allclose(full, cut, atol=1e-5)
    with pytest.raises(RequestError, match="a text of 257 tokens exceeds max_model_len=256"):
        llm.embed([long[:257]])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "a text without tokens"),
        ([[VOCAB]], {}, "token id 600 is out of range"),
        ("a", {"pooling": "max"}, "pooling='max' must be one of last, mean, cls"),
        ("a", {"dimensions": 65}, "dimensions=65 must be an integer from 1 to 64"),
        ("a", {"dimensions": True}, "dimensions=True must be"),
        ("a", {"normalize": 1}, "normalize=1 must be"),
    ],
)
def test_what_is_refused(prompts, options, message):
    with pytest.raises(RequestError, match=message):
        shared_llm().embed(prompts, use_tqdm=False, **options)


# -- rankings


def test_documents_are_ranked_by_what_the_model_says():
    llm, documents = shared_llm(), ["def f(x):", "import os {query}", "class A:", "def f(x):"]
    ranked = llm.rerank("a function", documents, use_tqdm=False)
    assert sorted(it.index for it in ranked) == [0, 1, 2, 3]
    assert [it.relevance for it in ranked] == sorted((it.relevance for it in ranked), reverse=True)
    for it in ranked:
        context = TEMPLATE.replace("{query}", "a function").replace("{document}", it.document)
        yes, no = llm.loglikelihood([(context, " yes"), (context, " no")], use_tqdm=False)
        assert it.document == documents[it.index]
        assert it.relevance == pytest.approx(np.exp(yes[0]) / (np.exp(yes[0]) + np.exp(no[0])), abs=1e-4)
    how = {"template": "{document}? {query}", "answers": (" A", " B"), "top_n": 2, "use_tqdm": False}
    assert len(llm.rerank("q", documents, **how)) == 2
    assert llm.rerank("q", [], use_tqdm=False) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": "text"}, "documents='text' a list of texts"),
        ({"template": "{query}"}, "has no {document}"),
        ({"answers": ("a", "a")}, "must be two texts"),
        ({"top_n": 0}, "top_n=0"),
    ],
)
def test_rankings_that_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        shared_llm().rerank(**{"query": "q", "documents": ["a"], **options})


def test_what_may_be_given():
    llm = shared_llm()
    ids = llm.encode("def f(x):")
    [want] = llm.embed(["def f(x):"], use_tqdm=False)
    for given in ("def f(x):", ids, np.array(ids), [ids], [np.array(ids)], (text for text in ["def f(x):"])):
        np.testing.assert_allclose(llm.embed(given, use_tqdm=False), [want], atol=1e-5)
    for given, message in (([None], "not None"), ([{"prompt": "a"}], "not {'prompt'"), ("\ud800", "not valid Unicode")):
        with pytest.raises(RequestError, match=message):
            llm.embed(given, use_tqdm=False)
    assert len(llm.rerank("q", (text for text in "ab"), use_tqdm=False)) == 2


# -- asyncio


def test_async_methods_answer_as_the_others_do():
    pairs, llm = [("def f", " x")], AsyncLLM(model_folder(), **OPTIONS)
    llm._llm._runner._programs = shared_llm()._runner._programs

    async def main():
        async with llm:
            return await asyncio.gather(llm.score(pairs), llm.score_rolling(["def f"]), llm.embed(PROMPTS),
                                        llm.rerank("q", ["a", "b"]))  # fmt: skip

    scores, rolling, vectors, ranked = asyncio.run(main())
    sync = shared_llm()
    assert scores[0].logprob == pytest.approx(sync.score(pairs, use_tqdm=False)[0].logprob, abs=1e-4)
    want = sync.score_rolling(["def f"], use_tqdm=False)[0].logprob
    assert rolling[0].logprob == pytest.approx(want, abs=1e-4)
    np.testing.assert_allclose(vectors, sync.embed(PROMPTS, use_tqdm=False), atol=1e-5)
    assert [it.index for it in ranked] == [it.index for it in sync.rerank("q", ["a", "b"], use_tqdm=False)]
