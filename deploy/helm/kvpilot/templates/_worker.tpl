{{/* The folder of a pool's weights, as its container sees it. */}}
{{- define "kvpilot.modelFolder" -}}
{{- if .fetch -}}
/models/models/{{ default .name .path }}
{{- else -}}
/models/{{ .path }}
{{- end -}}
{{- end -}}

{{/* The image of a pool's workers. Takes a list: root, the pool's values. */}}
{{- define "kvpilot.workerImage" -}}
{{- $values := index . 1 -}}
{{- $suffix := default (printf "-%s" $values.device) $values.imageTagSuffix -}}
{{- include "kvpilot.image" (list (index . 0) "worker" $suffix $values.imageDigest) -}}
{{- end -}}

{{/* What brings the weights into the pod. Takes a dictionary: root, values. */}}
{{- define "kvpilot.modelInit" -}}
{{- $model := .values.model -}}
- name: model
  {{- if $model.fetch }}
  image: {{ include "kvpilot.workerImage" (list .root .values) | quote }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [/opt/kvpilot/bin/kvpilot, model, fetch, {{ $model.fetch | quote }}]
  env:
    - {name: KVPILOT_CACHE, value: /models}
  {{- else }}
  image: {{ $model.init.image | quote }}
  command: {{ $model.init.command | toJson }}
  {{- with $model.init.env }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  securityContext:
    {{- include "kvpilot.containerSecurity" .root | nindent 4 }}
  resources:
    {{- toYaml (default (dict
      "requests" (dict "cpu" "500m" "memory" "2Gi") "limits" (dict "cpu" "2" "memory" "4Gi")
    ) (dig "init" "resources" nil $model)) | nindent 4 }}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
{{- end -}}

{{/* A pool's Deployment. Takes a dictionary: root, pool, values. */}}
{{- define "kvpilot.worker" -}}
{{- $root := .root -}}
{{- $values := .values -}}
{{- $model := $values.model -}}
{{- $name := printf "%s-worker-%s" (include "kvpilot.fullname" $root) .pool -}}
{{- $who := list $root "worker" .pool -}}
{{- if not $model.name }}{{ fail (printf "workers.%s.model.name: what clients ask for is needed" .pool) }}{{ end -}}
{{- $sources := 0 }}
{{- range list "existingClaim" "fetch" "init" }}{{ if index $model . }}{{ $sources = add $sources 1 }}{{ end }}{{ end -}}
{{- if ne (int $sources) 1 -}}
{{- fail (printf "workers.%s.model: exactly one of existingClaim, fetch, init is needed, got %d" .pool (int $sources)) -}}
{{- end -}}
{{- if and (not $model.fetch) (not $model.path) -}}
{{- fail (printf "workers.%s.model.path: the folder of the weights in the volume is needed" .pool) -}}
{{- end -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "kvpilot.labels" $who | nindent 4 }}
spec:
  {{- if not $values.keda.enabled }}
  replicas: {{ $values.replicas }}
  {{- end }}
  revisionHistoryLimit: 5
  strategy:
    type: RollingUpdate
    rollingUpdate:
      {{- toYaml $values.rollingUpdate | nindent 6 }}
  # Loading a model may take longer than the usual ten minutes.
  progressDeadlineSeconds: {{ add $values.startupSeconds 600 }}
  selector:
    matchLabels:
      {{- include "kvpilot.selector" $who | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "kvpilot.podLabels" $who | nindent 8 }}
      annotations:
        kubectl.kubernetes.io/default-container: worker
        {{- with $root.Values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- with $values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      {{- include "kvpilot.pod" (list $root "worker" $values .pool) | nindent 6 }}
      # Running jobs finish or are handed over, then the process ends.
      terminationGracePeriodSeconds: {{ add $values.drainSeconds 30 }}
      {{- if not $model.existingClaim }}
      initContainers:
        {{- include "kvpilot.modelInit" (dict "root" $root "values" $values) | nindent 8 }}
      {{- end }}
      containers:
        - name: worker
          image: {{ include "kvpilot.workerImage" (list $root $values) | quote }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          securityContext:
            {{- include "kvpilot.containerSecurity" $root | nindent 12 }}
          env:
            - name: KVPILOT_WORKER_NAME
              valueFrom: {fieldRef: {fieldPath: metadata.name}}
            # Threads of torch and the kernels: else one for each core of the node.
            - name: KVPILOT_WORKER_THREADS
              valueFrom: {resourceFieldRef: {containerName: worker, resource: limits.cpu, divisor: "1"}}
            - name: KVPILOT_WORKER_LOG_FORMAT
              value: json
            {{- if $root.Values.metrics.enabled }}
            - name: KVPILOT_WORKER_METRICS_LISTEN
              value: 0.0.0.0:{{ $root.Values.metrics.port }}
            {{- end }}
            {{- include "kvpilot.settings" (list "KVPILOT_WORKER_" (merge (deepCopy $values.settings) (dict
              "MODEL" (include "kvpilot.modelFolder" $model)
              "MODEL_NAME" $model.name
              "CONTROLLERS" (printf "%s-steering-pods:7450" (include "kvpilot.fullname" $root))
              "DEVICE" $values.device
              "DTYPE" $values.dtype
              "DEVICE_BUDGET_BYTES" $values.deviceBudget
              "HOST_BUDGET_BYTES" $values.hostBudget
              "DISK_BUDGET_BYTES" $values.diskBudget
              "DISK_FOLDER" "/var/cache/kvpilot/blocks"
              "DEFAULT_PIPELINE" $values.defaultPipeline
              "MAX_RUNNING" $values.maxRunning
              "DRAIN_TIMEOUT_S" $values.drainSeconds
              "HEALTH_LISTEN" "0.0.0.0:7451"
            ))) | nindent 12 }}
            {{- include "kvpilot.redis.env" (list $root "KVPILOT_WORKER_") | nindent 12 }}
            {{- with $values.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: health, containerPort: 7451}
            {{- if $root.Values.metrics.enabled }}
            - {name: metrics, containerPort: {{ $root.Values.metrics.port }}}
            {{- end }}
          resources:
            requests:
              {{- toYaml $values.resources.requests | nindent 14 }}
            limits:
              {{- toYaml $values.resources.limits | nindent 14 }}
              {{- if eq $values.device "cuda" }}
              {{ $values.gpuResource }}: 1
              {{- end }}
          # Until the model is loaded and jobs are taken.
          startupProbe:
            {{- include "kvpilot.probe" (list 7451 "kvpilot.v1.Worker") | nindent 12 }}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: {{ div (add $values.startupSeconds 4) 5 }}
          readinessProbe:
            {{- include "kvpilot.probe" (list 7451 "kvpilot.v1.Worker") | nindent 12 }}
            periodSeconds: 5
            timeoutSeconds: 5
          livenessProbe:
            {{- include "kvpilot.probe" (list 7451 "") | nindent 12 }}
            periodSeconds: 15
            timeoutSeconds: 10
            failureThreshold: 6
          volumeMounts:
            - {name: models, mountPath: /models, readOnly: true}
            - {name: cache, mountPath: /var/cache/kvpilot}
            - {name: tmp, mountPath: /tmp}
            {{- with $values.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        - name: models
          {{- if $model.existingClaim }}
          persistentVolumeClaim: {claimName: {{ $model.existingClaim | quote }}, readOnly: true}
          {{- else }}
          emptyDir: {}
          {{- end }}
        - name: cache
          {{- if $values.cache.existingClaim }}
          persistentVolumeClaim: {claimName: {{ $values.cache.existingClaim | quote }}}
          {{- else }}
          emptyDir: {sizeLimit: {{ $values.cache.sizeLimit }}}
          {{- end }}
        - name: tmp
          emptyDir: {sizeLimit: 2Gi}
        {{- with $values.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end -}}
