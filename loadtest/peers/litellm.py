"""LiteLLM's proxy: one worker, a master key, and nothing that asks the internet."""

from typing import Final

import orjson

from loadtest.peers.peer import KEY, MODEL, Launch, Peer, Scene


def _launch(program: str, scene: Scene) -> Launch:
    config = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {
                    "model": "openai/deepseek-ai/DeepSeek-R1",
                    "api_base": f"{scene.upstream}/v1",
                    "api_key": "up",
                },
            }
        ],
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"drop_params": True},
    }
    path = scene.file("litellm.yaml", orjson.dumps(config).decode())
    options = ["--host", "127.0.0.1", "--port", str(scene.port), "--num_workers", "1"]
    if scene.certificate:
        paths = str(scene.certificate.path), str(scene.certificate.key_path)
        options += ["--ssl_certfile_path", paths[0], "--ssl_keyfile_path", paths[1]]
    # Without these it asks the internet for prices and logs each request.
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"}
    return Launch([program, "--config", path, *options], environment=quiet)


PEER: Final = Peer(
    "litellm",
    "one worker",
    _launch,
    program="litellm",
    package="litellm",
    # 1.82.7 and 1.82.8 on PyPI carried malware, and 1.107.0 was reported to carry it too.
    install="pip install 'litellm[proxy]==1.106.2'",
    load_divisor=25,
    tls=True,
)
