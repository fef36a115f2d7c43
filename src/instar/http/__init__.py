"""What every HTTP API of the cloud shares: routes, requests and answers, authentication, policy, faults, paging.

Each API room hands one `Service` to `build_app`; all of them are served behind one port. The room's words:

- `routing.Route`: method, path template, name of the policy rule, handler. A route without a rule cannot be written.
- `request.Request`: what a handler gets: `context`, path `params`, `query`, `body()`, `json(Type)`, `stream()`.
- `answer.Answer`: what a handler returns; `json_answer`, `empty_answer`, `stream_answer` make one.
- `policy.Policy`: the room's table of rules; `require(context, name)` for what the route alone cannot decide.
- `faults`: one shape of error body for each API. Handlers raise errors of `instar.errors` and never build a fault.
- `paging`: `limit`, `marker` and the links of a list.
- `server.HttpServer`: serves an app in the running event loop.

How to add an endpoint
----------------------
1. Add the body as a frozen Struct with `forbid_unknown_fields=True` to your room, with limits as `msgspec.Meta`.
2. Add the rule to your room's policy table: ``"compute:flavors:create": Rule("admin")``. Only `OPEN` needs no token.
3. Write the handler, in the file of its subject::

       async def flavor_create(request: Request) -> Answer:
           wanted = await request.json(CreateFlavor)              # 400 with the JSON path when it does not fit
           flavor = await flavors.create(wanted.flavor)           # raises errors.Conflict, never an HTTP status
           return json_answer({"flavor": view(flavor)})

   Records of a project are fetched by id and project; `policy.own_project(...)` makes another project's record a 404.
4. Add the route to your room's list: ``Route("POST", "/v2.1/flavors", "compute:flavors:create", flavor_create)``. Paths
   are below the service's prefix; a literal segment wins over ``{parameter}``; HEAD is answered by the GET route.
5. Add a row to your room's test that walks all routes as each role and as another project: it fails without one.
"""
