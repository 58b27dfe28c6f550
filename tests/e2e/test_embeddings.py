"""Real servers with an encoder, a cross-encoder and a decoder, under the openai client; and the same offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray
from running import serving
from transformers import AutoModel, AutoModelForSequenceClassification

from encoder_checkpoints import LONGEST, letters, save_encoder
from ropeway import LLM, PoolingParams
from ropeway.errors import ContextLengthError, RequestError

Make = Callable[[str], Path]
TEXTS = ["a cable car never stops", "b", "cabins keep moving.", "x" * 40]
FLAGS = ("--max-num-seqs", "8")


def mean(directory: Path, text: str) -> NDArray[np.float32]:
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(torch.tensor([letters().encode(text).ids])).last_hidden_state[0]
    found: NDArray[np.float32] = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
    return found


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder("bert", tmp_path_factory.mktemp("sentences"), "mean_tokens")


async def test_an_encoder_behind_the_openai_client(sentences: Path) -> None:
    with serving(model=str(sentences), small=("--threads", "1", *FLAGS)) as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            model = (await client.models.list()).data[0].id
            answer = await client.embeddings.create(model=model, input=TEXTS)
            for text, one in zip(TEXTS, answer.data, strict=True):
                np.testing.assert_allclose(one.embedding, mean(sentences, text), atol=1e-5)
            assert answer.usage.prompt_tokens == sum(len(letters().encode(text).ids) for text in TEXTS)
            cut = await client.embeddings.create(
                model=model, input="y " * 200, extra_body={"truncate_prompt_tokens": -1}, dimensions=8
            )
            expected = mean(sentences, "y " * (LONGEST - 2))[:8]
            np.testing.assert_allclose(cut.data[0].embedding, expected / np.linalg.norm(expected), atol=1e-5)
            with pytest.raises(openai.BadRequestError, match="maximum context length is 64 tokens"):
                await client.embeddings.create(model=model, input="y " * 200)
            with pytest.raises(openai.BadRequestError, match="generates no text"):
                await client.completions.create(model=model, prompt="a")
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
            scores = (await http.post("/v1/score", json={"text_1": TEXTS[0], "text_2": TEXTS})).json()["data"]
    vectors = [mean(sentences, text) for text in TEXTS]
    assert [one["score"] for one in scores] == pytest.approx([float(vectors[0] @ v) for v in vectors], abs=1e-5)


def test_offline_it_is_the_same(sentences: Path) -> None:
    with LLM(str(sentences), threads=1, max_num_seqs=4) as llm:
        for text, output in zip(TEXTS, llm.embed(TEXTS), strict=True):
            np.testing.assert_allclose(output.outputs.embedding, mean(sentences, text), atol=1e-5)
        short = llm.embed("b", pooling_params=PoolingParams(dimensions=3, use_activation=False, pooling="cls"))
        assert len(short[0].outputs.embedding) == 3
        with pytest.raises(ContextLengthError):
            llm.embed(["a", "y " * 200])
        assert len(llm.embed("y " * 200, truncate_prompt_tokens=20)[0].prompt_token_ids) == 20
        with pytest.raises(RequestError, match="generates no text"):
            llm.generate("a")
        assert llm.score("b", ["b", "c"])[0].outputs.score == pytest.approx(1)


def test_a_cross_encoder_offline(encoder: Make) -> None:
    directory = encoder("bert-judge")
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    expected = []
    for text in TEXTS:
        pair = letters().encode("a cable", text)
        with torch.no_grad():
            output = model(torch.tensor([pair.ids]), token_type_ids=torch.tensor([pair.type_ids]))
        expected.append(float(output.logits[0].sigmoid()))
    with LLM(str(directory), threads=1) as llm:
        assert [one.outputs.score for one in llm.score("a cable", TEXTS)] == pytest.approx(expected, abs=1e-5)
        with pytest.raises(RequestError, match="cross-encoder"):
            llm.embed("a")


def test_a_decoder_offline() -> None:
    """The bundled model makes vectors of its last states, of the length 1, and generates beside that."""
    with LLM(threads=1, num_kv_blocks=256, max_num_seqs=8) as llm:
        outputs = [one.outputs.embedding for one in llm.embed([TEXTS[0], TEXTS[0], "Another text."])]
        assert np.linalg.norm(outputs[0]) == pytest.approx(1, abs=1e-4)
        assert outputs[0] == pytest.approx(outputs[1], abs=1e-3)
        scores = [one.outputs.score for one in llm.score(TEXTS[0], [TEXTS[0], "Another text."])]
        assert scores[0] == pytest.approx(1, abs=1e-3)
        assert scores[1] < 0.999
