"""Serve builder: a service of image models on a cluster, with typed args.

Every node's Ray must have been started with RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH and EAGLERAY_SERVING_SETTINGS
(docs/serving.md): without the gateway the app refuses every request.

Example:
    $ serve run serve_apps.classify:app model=bundles/lite0 keys=keys.json
    $ serve deploy serve_apps/serve.yaml
"""

from eagleray.flows.deployment import build
from eagleray.flows.serve import ServeConfig, to_serving
from eagleray.serving.models import pinned
from ray.serve import Application


def app(config: ServeConfig) -> Application:
    """The application, pinned to the models that its bundles hold now where Serve builds it.

    Args:
        config: The keys of ServeConfig; ``model`` is the one that must be given. Serve's own file says where it
            listens, so host and port count for the checks only.

    Raises:
        ArtifactError: A bundle does not hold, or is not on this node.
    """
    return build(pinned(to_serving(config)))
