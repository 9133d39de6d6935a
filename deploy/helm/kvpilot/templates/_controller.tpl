{{/* A controller's Deployment. Takes a dictionary: root, component, roles, values, health (service for readiness), env. */}}
{{- define "kvpilot.controller" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $name := printf "%s-%s" (include "kvpilot.fullname" $root) .component -}}
{{- $who := list $root .component -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "kvpilot.labels" $who | nindent 4 }}
spec:
  {{- if not (dig "autoscaling" "enabled" false .values) }}
  replicas: {{ .values.replicas }}
  {{- end }}
  revisionHistoryLimit: 5
  # Old and new replicas serve side by side until the new ones are ready: adjacent versions work together.
  strategy:
    type: RollingUpdate
    rollingUpdate: {maxSurge: 1, maxUnavailable: 0}
  selector:
    matchLabels:
      {{- include "kvpilot.selector" $who | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "kvpilot.podLabels" $who | nindent 8 }}
      annotations:
        kubectl.kubernetes.io/default-container: controller
        {{- with $values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      {{- include "kvpilot.pod" (list $root .component .values) | nindent 6 }}
      terminationGracePeriodSeconds: {{ add $values.controller.preStopSleepSeconds $values.controller.graceSeconds 10 }}
      containers:
        - name: controller
          image: {{ include "kvpilot.image" (list $root "controller" "" $values.image.controller.digest) | quote }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          securityContext:
            {{- include "kvpilot.containerSecurity" $root | nindent 12 }}
          env:
            - name: KVPILOT_CONTROLLER_NAME
              valueFrom: {fieldRef: {fieldPath: metadata.name}}
            - name: POD_IP
              valueFrom: {fieldRef: {fieldPath: status.podIP}}
            {{- if $values.metrics.enabled }}
            - name: KVPILOT_CONTROLLER_METRICS_LISTEN
              value: 0.0.0.0:{{ $values.metrics.port }}
            {{- end }}
            {{- include "kvpilot.settings" (list "KVPILOT_CONTROLLER_" (merge (deepCopy .values.settings) .settings (dict
              "LISTEN" "0.0.0.0:7450"
              "ROLES" .roles
              "GRACE_S" $values.controller.graceSeconds
              "LOG_LEVEL" $values.controller.logLevel
              "LOG_FORMAT" "json"
            ))) | nindent 12 }}
            {{- include "kvpilot.redis.env" (list $root "KVPILOT_CONTROLLER_") | nindent 12 }}
            {{- with $values.controller.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: grpc, containerPort: 7450}
            {{- if $values.metrics.enabled }}
            - {name: metrics, containerPort: {{ $values.metrics.port }}}
            {{- end }}
          resources:
            {{- toYaml .values.resources | nindent 12 }}
          startupProbe:
            {{- include "kvpilot.probe" (list 7450 .health) | nindent 12 }}
            periodSeconds: 2
            failureThreshold: 60
          readinessProbe:
            {{- include "kvpilot.probe" (list 7450 .health) | nindent 12 }}
            periodSeconds: 5
            timeoutSeconds: 3
          livenessProbe:
            {{- include "kvpilot.probe" (list 7450 "") | nindent 12 }}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          lifecycle:
            preStop: {sleep: {seconds: {{ $values.controller.preStopSleepSeconds }}}}
          volumeMounts:
            - {name: cache, mountPath: /var/cache/kvpilot}
            - {name: tmp, mountPath: /tmp}
            {{- with $values.controller.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        - name: cache
          emptyDir: {sizeLimit: {{ $values.controller.cacheSizeLimit }}}
        - name: tmp
          emptyDir: {sizeLimit: 256Mi}
        {{- with $values.controller.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end -}}

{{/* Its PodDisruptionBudget, where there is more than one replica to speak of. */}}
{{- define "kvpilot.disruption" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  namespace: {{ (index .who 0).Release.Namespace }}
  labels:
    {{- include "kvpilot.labels" .who | nindent 4 }}
spec:
  maxUnavailable: {{ .budget.maxUnavailable }}
  # A pod that is not ready anyway may always be moved.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "kvpilot.selector" .who | nindent 6 }}
{{- end -}}
