"""Where svdbank meets PEFT: the same ``LoraConfig``, with a lookup in place of the SVDs.

PEFT does everything as it always does — matching modules, replacing them, ranks, scales, saving. It makes the new layers without values, so
that nothing is drawn, decomposed, gathered or dequantised for them; the values of ``init_lora_weights="mica"``, ``"milora"`` and
``"pissa"`` are then looked up together and put in place.
"""

from svdbank.peft.lookup import Attachment, UnverifiedBaseWarning
from svdbank.peft.models import attachment, get_peft_model, load_adapter
from svdbank.peft.routing import use_bank

__all__ = ["Attachment", "UnverifiedBaseWarning", "attachment", "get_peft_model", "load_adapter", "use_bank"]
