"""An image API that OpenAI's clients speak: `python -m infer.serve`"""

from ssd_jax.cli import serve

if __name__ == "__main__":
  serve.main()
