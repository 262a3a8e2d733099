"""BERTScore with a tiny random BERT, against loops by hand and against the package."""

import pytest
import torch

from fastrl.rewards.bert_score import LAYERS, BERTScore

transformers = pytest.importorskip("transformers")

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat dog sat on mat ran . red big".split()
TEXTS = ["the cat sat", "a big dog ran on the mat .", "the red cat", "the the the"]
REFERENCES = ["the red cat sat .", "a dog ran", "a mat", "the cat sat on the red mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=24)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def call(reward, texts, references):
    return reward(["p"] * len(texts), texts, None, reference=references)


def by_hand(folder, text, reference, layer):
    """Precision, recall and F1 with one text at a time and loops over the tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    sides = []
    for one in (text, reference):
        ids = torch.tensor([tokenizer(one)["input_ids"]])
        with torch.no_grad():
            sides.append(model(ids, output_hidden_states=True).hidden_states[layer][0].double())
    x, y = sides

    def mean_of_best(a, b):  # the ends of a do not count, those of b may be matched
        best = [max(float(torch.cosine_similarity(u, v, dim=0)) for v in b) for u in a[1:-1]]
        return sum(best) / len(best)

    p, r = mean_of_best(x, y), mean_of_best(y, x)
    return p, r, 2 * p * r / (p + r)


def test_it_is_greedy_matching_by_cosine(folder):
    for text, reference in zip(TEXTS, REFERENCES, strict=True):
        expected = by_hand(folder, text, reference, 2)
        for measure, truth in zip(("precision", "recall", "f1"), expected, strict=True):
            reward = BERTScore(folder, num_layers=2, measure=measure, rescale=0.25)
            given = call(reward, [text], [reference])
            assert given == [pytest.approx((truth - 0.25) / 0.75, abs=1e-6)]


@pytest.mark.parametrize("idf", [False, REFERENCES])
def test_it_equals_the_package(folder, idf):
    package = pytest.importorskip("bert_score")
    scorer = package.BERTScorer(
        model_type=folder, num_layers=2, idf=bool(idf), idf_sents=idf or None, nthreads=0,
        device="cpu",
    )  # fmt: skip
    expected = scorer.score(TEXTS, REFERENCES)
    for measure, truth in zip(("precision", "recall", "f1"), expected, strict=True):
        reward = BERTScore(folder, num_layers=2, measure=measure, idf=idf, batch_size=3)
        assert call(reward, TEXTS, REFERENCES) == pytest.approx(truth.tolist(), abs=1e-5)
    if idf:
        assert call(BERTScore(folder, num_layers=2, idf=True), TEXTS, REFERENCES) == (
            pytest.approx(expected[2].tolist(), abs=1e-5)
        )
    table = package.utils.model2layers
    assert {name: table[name] for name in LAYERS} == LAYERS


def test_several_references_none_empty_and_long_texts(folder):
    reward = BERTScore(folder, num_layers=3)
    chat = [{"role": "assistant", "content": TEXTS[0]}]
    one, two = call(reward, [TEXTS[0]] * 2, REFERENCES[:2])
    given = call(reward, [chat, TEXTS[0]], [REFERENCES[:2], None])
    assert given == [pytest.approx(max(one, two)), None]
    assert call(reward, ["", " ", "the cat"], ["the cat", "", ""]) == [0.0, 0.0, 0.0]
    long = "the cat sat on " * 20
    assert call(reward, [long, "the cat"], [long, "the cat"]) == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="expected a column 'reference'"):
        reward(["p"], ["c"])
    with pytest.raises(ValueError, match="expected column 'reference' of texts"):
        call(reward, ["a"], [3])


def test_texts_are_cut_where_the_model_has_no_more_positions(folder, tmp_path):
    """RoBERTa's table begins with rows that no token has; its tokenizers may know no limit."""
    config = transformers.RobertaConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=12, pad_token_id=1,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    del tokenizer.init_kwargs["model_max_length"]
    tokenizer.save_pretrained(tmp_path)
    reward, long = BERTScore(str(tmp_path), num_layers=1), "the cat sat on " * 4
    cut = "the cat sat on the cat sat on"  # 8 and both ends are 10 = 12 - 2 positions
    assert call(reward, [long], [cut]) == [pytest.approx(1.0)]


def test_a_text_begins_as_after_a_space_where_that_matters():
    class RobertaLike:
        def __call__(self, text):
            return {"input_ids": text}

    class BertLike(RobertaLike):
        pass

    reward = BERTScore.__new__(BERTScore)
    for tokenizer, expected in ((RobertaLike(), [" a b", ""]), (BertLike(), ["a b", ""])):
        reward._tokenizer, reward._limit = tokenizer, None
        assert [reward._ids(text) for text in (" a b\n", " ")] == expected


def test_what_is_missing_or_wrong_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected weights and tokenizer of .*nothing"):
        BERTScore(str(tmp_path / "nothing"), num_layers=1)
    with pytest.raises(FileNotFoundError, match="local_files_only = False"):
        BERTScore("nobody/has-this-model", num_layers=1)
    for message, options in (
        ("num_layers >= 0", {}),
        ("num_layers <= 3", {"num_layers": 4}),
        ("measure", {"num_layers": 1, "measure": "f2"}),
        ("rescale below 1", {"num_layers": 1, "rescale": 1.0}),
        ("batch_size >= 1", {"num_layers": 1, "batch_size": 0}),
    ):
        with pytest.raises(ValueError, match=f"BERTScore: expected {message}"):
            BERTScore(folder, **options)


def test_loading_leaves_torchs_generator_alone(folder):
    before = torch.get_rng_state()
    call(BERTScore(folder, num_layers=1), TEXTS, REFERENCES)
    assert torch.equal(torch.get_rng_state(), before)
