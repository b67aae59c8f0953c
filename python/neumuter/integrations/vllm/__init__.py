"""NeuMuter as a plug-in of vLLM: a mute set for each request, under continuous batching.

The entry point ``neumuter`` of the group ``vllm.general_plugins`` is ``register``. It does nothing unless the
environment variable NEUMUTER_VLLM_SETS names a folder of mute files. See docs/serving.md.

- ``settings``, ``support``: what the operator asks for; the versions and features of vLLM that are served.
- ``folder``, ``admission``: in the front end, what a request asks for; ``stamp``: how it goes to the engine.
- ``rows``, ``worker``: in each worker, which tokens use which set; ``check``: that the muting arrives.
- ``hooks``: where these are put into vLLM. It alone changes classes of vLLM.
"""

from neumuter.integrations.vllm.settings import is_asked


def register() -> None:
    """Put mute sets into vLLM, where NEUMUTER_VLLM_SETS asks for them.

    vLLM calls this in each of its processes. What it raises stops the process: vLLM does not catch it, while
    it only logs what an entry point raises on import. So nothing that may fail is imported before.

    Raises:
        RuntimeError: a version of vLLM that was not tested.
        ValueError: a setting is not as described.
    """
    if is_asked():
        from neumuter.integrations.vllm.hooks import install

        install()
