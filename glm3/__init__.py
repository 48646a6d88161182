"""ChatGLM3-6B (`--mode glm3`): the network of glm2 with its own tokens and prompt."""
