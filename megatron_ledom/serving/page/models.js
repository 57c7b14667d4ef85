// The models of the server, as /v1/models lists them.

let models = [];

/** Remember the models of the server. */
export function setModels(found) {
  models = found;
}

/** Return the name of the model with a direction; null if the server has none, or has not told yet. */
export const nameOf = (direction) => models.find((model) => model.direction === direction)?.id ?? null;
