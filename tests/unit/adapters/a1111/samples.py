"""What a real A1111 1.10 answered, trimmed to the fields that tests need (from recordings/a1111)."""

import json

DOCUMENTS = {
    "sd-models": json.dumps(
        [
            {
                "title": "tinyA.safetensors",
                "model_name": "tinyA",
                "hash": None,
                "sha256": None,
                "filename": "/srv/webui/models/Stable-diffusion/tinyA.safetensors",
            },
            {
                "title": "xl/tinyB.safetensors [0123456789]",
                "model_name": "xl_tinyB",
                "hash": "0123456789",
                "sha256": "0123456789" + "a" * 54,
                "filename": "/srv/webui/models/Stable-diffusion/xl/tinyB.safetensors",
            },
        ]
    ).encode(),
    "samplers": json.dumps(
        [
            {"name": "DPM++ 2M", "aliases": ["k_dpmpp_2m"], "options": {"scheduler": "karras"}},
            {"name": "Euler a", "aliases": ["k_euler_a", "k_euler_ancestral"], "options": {}},
            {"name": "Euler", "aliases": ["k_euler"], "options": {}},
        ]
    ).encode(),
    "schedulers": json.dumps(
        [
            {"name": "automatic", "label": "Automatic", "aliases": None},
            {"name": "karras", "label": "Karras", "aliases": None},
            {"name": "sgm_uniform", "label": "SGM Uniform", "aliases": ["SGMUniform"]},
        ]
    ).encode(),
    "upscalers": b'[{"name":"None"},{"name":"Lanczos"},{"name":"R-ESRGAN 4x+"}]',
    "latent-upscale-modes": b'[{"name":"Latent"},{"name":"Latent (antialiased)"}]',
    "sd-vae": b'[{"model_name":"nice.vae.pt","filename":"/srv/vae/nice.vae.pt"}]',
    "loras": b'[{"name":"detail","alias":"more_detail","path":"/srv/l.safetensors","metadata":{}}]',
    "scripts": b'{"txt2img":["prompt matrix","x/y/z plot"],"img2img":["loopback"]}',
    "options": json.dumps(
        {
            "sd_model_checkpoint": "tinyA.safetensors",
            "CLIP_stop_at_last_layers": 1,
            "outdir_samples": "/srv/out",
            "cross_attention_optimization": "Automatic",
            "js_modal_lightbox": True,
            "s_noise": 1.0,
        }
    ).encode(),
}
