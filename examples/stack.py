"""Two domains on one base: trained, stacked, one taken out again, each measured on text that it was not trained on.

python examples/stack.py [MODEL]
"""

import sys
from pathlib import Path

import svdbank

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
bank = svdbank.build(name)

folder = Path("stack-run")
folder.mkdir(exist_ok=True)
domains = {
    "law": "Clause {}: the licensee shall keep notice {} and may not sublicense the work.\n\n",
    "med": "Case {}: the patient had a fever for {} days and no rash.\n\n",
}
for domain, sentence in domains.items():
    (folder / f"{domain}.txt").write_text("".join(sentence.format(i, i + 3) for i in range(200)))
    (folder / f"{domain}-unseen.txt").write_text("".join(sentence.format(i, i + 7) for i in range(900, 930)))

law, med, both = (str(folder / part) for part in ("law", "med", "both"))
run = {"rank": 16, "steps": 10, "length": 64, "batch_size": 4, "learning_rate": 2e-3, "held_out": 0.0, "force": True}
svdbank.train(name, output=law, data=[f"{law}.txt"], **run)
svdbank.train(name, output=med, data=[f"{med}.txt"], on_top_of=[law], **run)  # in directions that law leaves free

print(svdbank.compare([law, med]).pairs[0].verdict)
svdbank.stack([law, med], output=both, force=True)
svdbank.stack([both], output=f"{both}-without-med", drop=["med"], force=True)  # the folders law and med are not needed

texts = {domain: f"{folder}/{domain}-unseen.txt" for domain in domains}
report = svdbank.eval(name, data=texts, adapters={"law": law, "both": both, "without med": f"{both}-without-med"})
for score in report.scores:
    print(f"{score.adapter:12} {score.text:4} {score.loss:.3f}")
