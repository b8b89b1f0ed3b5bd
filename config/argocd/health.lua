-- Health of Domicile's kinds for Argo CD, which doesn't read kstatus conditions by itself.
--
-- Stalled: a person must act (Degraded). Ready: as specified (Healthy). Anything else: on its way (Progressing).
-- What was said about an older generation says nothing about this one.
local health = { status = "Progressing", message = "waiting for the operator" }
if obj.metadata.deletionTimestamp ~= nil then
  health.message = "being deleted"
  return health
end
local annotations = obj.metadata.annotations
if annotations ~= nil and annotations["domicile.dev/pause"] == "true" then
  return { status = "Suspended", message = "left alone, as the annotation domicile.dev/pause asks" }
end
local status = obj.status
if status == nil or status.conditions == nil then
  return health
end
if status.observedGeneration ~= nil and status.observedGeneration ~= obj.metadata.generation then
  return health
end
for _, condition in ipairs(status.conditions) do
  if condition.type == "Stalled" and condition.status == "True" then
    return { status = "Degraded", message = condition.message }
  end
end
for _, condition in ipairs(status.conditions) do
  if condition.type == "Ready" then
    health.message = condition.message
    if condition.status == "True" then
      health.status = "Healthy"
    end
  end
end
return health
