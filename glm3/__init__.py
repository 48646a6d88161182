"""ChatGLM3-6B (`--mode glm3`): the network of glm2 with its own tokens and prompt."""

from dataclasses import replace

from glm2 import FAMILY as GLM2

FAMILY = replace(GLM2, name="glm3", title="ChatGLM3-6B", package="glm3", released_name="chatglm3", vllm_values={})
