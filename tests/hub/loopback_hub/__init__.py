"""A small Hub on loopback for tests: the installed `huggingface_hub` client talks to it as to the real one.

    with LoopbackHub({"hf_mine": "me"}) as hub:
        subprocess.run([sys.executable, …], env={**os.environ, **hub.environment("hf_mine", home)})
        assert hub.store.repositories["me/model"].head().files["config.json"]
        assert not [request for request in hub.requests if request.method == "PUT"]

Clients read HF_ENDPOINT when they are imported, so they run in processes of their own.
"""

from .server import LoopbackHub, Request
from .store import Blob, Commit, HubError, Repository, Store

__all__ = ["Blob", "Commit", "HubError", "LoopbackHub", "Repository", "Request", "Store"]
