{{/* A pool's ScaledObject. Takes a dictionary: root, pool, values.

Jobs lie in one stream a priority until they have ended. Those that wait are the lag of its consumer group, those that wait
or run its length. The highest wish of all triggers counts, so running jobs keep their replicas.

What KEDA (2.17 and newer) does with a redis-streams trigger: with `consumerGroup` it reads the lag if `lagCount` is there,
else the group's pending entries, and takes no notice of `streamLength`. So triggers of length name no group. A stream that
is not there has length 0 and lag 0; where pending entries were asked for, it would be an error. While Redis cannot tell
the lag (NULL: an entry behind the last delivered one was deleted, as when a queued job is cancelled), KEDA takes it for -1,
before 2.18 for 0, and the trigger asks for nothing. Length is always known: by it a pool at 0 replicas starts all the same,
for a trigger without an activation value is active above 0.
*/}}
{{- define "kvpilot.scaledObject" -}}
{{- $root := .root -}}
{{- $name := printf "%s-worker-%s" (include "kvpilot.fullname" $root) .pool -}}
{{- $keda := $root.Values.keda -}}
{{- $address := $keda.redisAddress -}}
{{- if not $address -}}
{{- if $root.Values.redis.urlSecret.name -}}
{{- fail "keda.redisAddress: host:port of the job store is needed, for KEDA cannot read redis.urlSecret" -}}
{{- end -}}
{{- $address = printf "%s.%s:6379" (include "kvpilot.redis.host" $root) $root.Release.Namespace -}}
{{- end -}}
{{- $secret := $keda.passwordSecret -}}
{{- if not $secret.name }}{{ $secret = $root.Values.redis.internal.passwordSecret }}{{ end -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ $name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "kvpilot.labels" (list $root "worker" .pool) | nindent 4 }}
spec:
  scaleTargetRef: {name: {{ $name }}}
  minReplicaCount: {{ .values.keda.minReplicas }}
  maxReplicaCount: {{ .values.keda.maxReplicas }}
  pollingInterval: {{ .values.keda.pollingSeconds }}
  cooldownPeriod: {{ .values.keda.cooldownSeconds }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        scaleDown:
          stabilizationWindowSeconds: {{ .values.keda.cooldownSeconds }}
          policies:
            - {type: Pods, value: 1, periodSeconds: 60}
  triggers:
    {{- range include "kvpilot.queues" .values.model.name | fromJsonArray }}
    {{- $queue := . }}
    {{- range $measure, $jobs := dict "lagCount" $.values.keda.waitingJobs "streamLength" $.values.keda.jobs }}
    - type: redis-streams
      metadata:
        address: {{ $address | quote }}
        stream: {{ $queue | quote }}
        {{- if eq $measure "lagCount" }}
        consumerGroup: {{ include "kvpilot.group" $root | quote }}
        {{- end }}
        {{ $measure }}: {{ $jobs | quote }}
        databaseIndex: {{ $keda.databaseIndex | quote }}
        enableTLS: {{ $keda.enableTLS | quote }}
      {{- if $secret.name }}
      authenticationRef: {name: {{ include "kvpilot.fullname" $root }}-redis}
      {{- end }}
    {{- end }}
    {{- end }}
{{- end -}}
