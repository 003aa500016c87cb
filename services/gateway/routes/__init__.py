"""The routes, a file per resource."""

from services.gateway.routes import artifacts, batches, catalog, edits, health, jobs, speech, studio, uploads, voices

ROUTERS = (
    edits.router,
    batches.router,
    jobs.router,
    speech.router,
    voices.router,
    uploads.router,
    catalog.router,
    health.router,
    artifacts.router,
    studio.router,
)
