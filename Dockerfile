# ComfyUI with this pack and what the command line needs, fleets included. No model weights.
#
#   docker build -t comfyui-far .                                        NVIDIA GPUs
#   docker build -t comfyui-far:cpu --build-arg TORCH_BACKEND=cpu .      no GPU
FROM python:3.12-slim

# As uv names them: cpu, cu126, cu128, cu130, ... (https://docs.astral.sh/uv/guides/integration/pytorch)
ARG TORCH_BACKEND=cu128
ARG COMFYUI_VERSION=v0.33.0

RUN apt-get update \
    && apt-get install -y --no-install-recommends git libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv
ENV UV_SYSTEM_PYTHON=1 UV_NO_CACHE=1 UV_TORCH_BACKEND=$TORCH_BACKEND

WORKDIR /comfyui
RUN git clone --depth 1 --branch "$COMFYUI_VERSION" https://github.com/Comfy-Org/ComfyUI . \
    && uv pip install -r requirements.txt

# Before the pack itself, so that a change of its code doesn't install everything again.
WORKDIR /comfyui/custom_nodes/comfyui-far
COPY requirements.txt .
RUN uv pip install -r requirements.txt "ray[client]>=2.40"
COPY . .
RUN uv pip install --no-deps --editable .

# Not root, since whoever reaches the port can run workflows; and writable for those who start it as themselves.
RUN useradd --create-home --uid 1000 comfy && chmod -R a+rwX /comfyui
USER comfy

WORKDIR /comfyui
EXPOSE 8188
CMD ["python", "main.py", "--listen", "0.0.0.0"]
