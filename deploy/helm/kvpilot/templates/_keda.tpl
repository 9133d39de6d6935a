{{/* A pool's ScaledObject. Takes a dictionary: root, pool, values.

Jobs lie in one stream a priority until they have ended. Those that wait are the lag of its consumer group, those that wait
or run its length. The highest wish of all triggers counts, so running jobs keep their replicas. A priority that was never
used has no stream yet: its length and its lag are then 0, where its pending entries would be an error.
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
        consumerGroup: {{ include "kvpilot.group" $root | quote }}
        {{ $measure }}: {{ $jobs | quote }}
        {{- if eq $measure "lagCount" }}
        activationLagCount: "0"
        {{- end }}
        databaseIndex: {{ $keda.databaseIndex | quote }}
        enableTLS: {{ $keda.enableTLS | quote }}
      {{- if $secret.name }}
      authenticationRef: {name: {{ include "kvpilot.fullname" $root }}-redis}
      {{- end }}
    {{- end }}
    {{- end }}
{{- end -}}
